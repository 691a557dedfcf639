"""``hypha-certutil``: certificates of a root, organisations under it and nodes under those, from the first
to the revoked.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hypha.cli.running import run_program

if TYPE_CHECKING:
    from hypha.pki.authority import MadeFiles
    from hypha.pki.inspection import InspectedCertificate

app = typer.Typer(
    name="hypha-certutil",
    help="Certificates of a Hypha network: root, then organisations, then nodes.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Directory = Annotated[Path, typer.Option("--dir", "-d", help="Where to write; made when missing.")]
Trust = Annotated[
    Path | None,
    typer.Option(
        "--trust", "--ca-trust", help="What is above the CA; default: the -trust.pem beside its certificate."
    ),
]
Organization = Annotated[str, typer.Option("--organization", "-o", help="The organisation.")]


@app.command()
def root(
    organization: Organization,
    name: Annotated[str | None, typer.Option("--name", "-n", help="Default: <organization> Root CA.")] = None,
    country: Annotated[str | None, typer.Option(help="Two letters.")] = None,
    days: Annotated[int, typer.Option(help="Validity.", min=1)] = 3650,
    directory: Directory = Path(),
) -> None:
    """Make a root CA. Keep its key off the network."""
    from hypha.pki.authority import make_root

    _made(make_root(organization, directory, name=name, country=country, days=days))


@app.command()
def org(
    organization: Organization,
    root_cert: Annotated[Path, typer.Option(help="The root's certificate.")],
    root_key: Annotated[Path, typer.Option(help="The root's private key.")],
    name: Annotated[str | None, typer.Option("--name", "-n", help="Default: <organization> CA.")] = None,
    days: Annotated[int, typer.Option(help="Validity.", min=1)] = 1825,
    roles: Annotated[
        str,
        typer.Option(
            help="The only roles that its nodes may have, comma-separated, such as worker,data; default: all."
        ),
    ] = "",
    directory: Directory = Path(),
) -> None:
    """Make an organisation's CA, which issues certificates to nodes."""
    from hypha.pki.authority import CaFiles, make_org

    limits = [part.strip() for part in roles.split(",") if part.strip()]
    made = make_org(organization, CaFiles(root_cert, root_key), directory, name=name, days=days, roles=limits)
    _made(made)


@app.command()
def node(
    name: Annotated[str, typer.Option("--name", "-n", help="The node's name.")],
    ca_cert: Annotated[Path, typer.Option(help="The organisation CA's certificate.")],
    ca_key: Annotated[Path, typer.Option(help="The organisation CA's private key.")],
    trust: Trust = None,
    role: Annotated[
        list[str] | None,
        typer.Option("--role", "-r", help="gateway, scheduler, worker or data. May be repeated."),
    ] = None,
    san: Annotated[
        str,
        typer.Option("--san", "-s", help="DNS names, IP addresses or URIs, comma-separated; none needed."),
    ] = "",
    days: Annotated[int, typer.Option(help="Validity.", min=1)] = 365,
    directory: Directory = Path(),
) -> None:
    """Make a node's certificate, key and trust bundle."""
    from hypha.pki.authority import CaFiles, make_node

    made = make_node(
        name,
        CaFiles(ca_cert, ca_key, trust),
        directory,
        roles=role or (),
        san=[part.strip() for part in san.split(",") if part.strip()],
        days=days,
    )
    _made(made)
    if not role:
        typer.echo(
            "It carries no role, so nodes refuse it unless they have require_roles = false; give it one with "
            f"`hypha-certutil renew {made.cert} --role ...`"
        )


@app.command()
def renew(
    cert: Annotated[Path, typer.Argument(help="The node's certificate; it is replaced.")],
    ca_cert: Annotated[Path, typer.Option(help="The certificate of the organisation CA that issued it.")],
    ca_key: Annotated[Path, typer.Option(help="That CA's private key.")],
    trust: Trust = None,
    role: Annotated[
        list[str] | None,
        typer.Option("--role", "-r", help="Give it these roles instead of those it has. May be repeated."),
    ] = None,
    days: Annotated[int, typer.Option(help="Validity from now.", min=1)] = 365,
) -> None:
    """Give a node's certificate new dates: same key, PeerID, name and roles. Running nodes read it again."""
    from hypha.pki.authority import CaFiles, renew_node

    renewed = renew_node(cert, CaFiles(ca_cert, ca_key, trust), days=days, roles=role or ())
    typer.echo(f"renewed {cert}, valid until {renewed.not_valid_after_utc:%Y-%m-%d}")


@app.command()
def revoke(
    ca_cert: Annotated[Path, typer.Option(help="The certificate of the CA that issued them.")],
    ca_key: Annotated[Path, typer.Option(help="That CA's private key.")],
    certs: Annotated[
        list[Path] | None, typer.Argument(help="Certificates to revoke; none: only sign the list anew.")
    ] = None,
    crl: Annotated[
        Path | None,
        typer.Option(help="That CA's revocation list, made when missing; default: crls.pem beside ca-cert."),
    ] = None,
    trust: Trust = None,
    days: Annotated[
        int, typer.Option(help="Until when the list is fresh. It revokes after that, too.", min=1)
    ] = 30,
) -> None:
    """Revoke certificates, and the earlier ones of those that were renewed: nodes whose crls_pem is this list
    refuse them within seconds.
    """
    from hypha.pki.authority import CaFiles
    from hypha.pki.authority import revoke as revoke_certificates

    place = crl or ca_cert.with_name("crls.pem")
    count = revoke_certificates(CaFiles(ca_cert, ca_key, trust), certs or [], place, days=days)
    typer.echo(f"wrote {place}; it lists {count} certificate{'' if count == 1 else 's'}")
    typer.echo(
        "Copy it to where the crls_pem of each node points; a node without that key does not hear of it."
    )


@app.command()
def show(path: Annotated[Path, typer.Argument(help="A PEM file with certificates.")]) -> None:
    """Print what certificates say; exit 1 when one is not usable."""
    from hypha.pki.inspection import inspected, key_beside, key_problems
    from hypha.pki.issuers import load_chain

    typer.echo(str(path))
    certificates = load_chain(path)
    problems = [problem for one in certificates for problem in _show(inspected(one))]
    if (key := key_beside(path)) is not None:
        found = key_problems(key, certificates[0])
        typer.echo(f"  key          {key}{'' if found else ', belongs to the certificate'}")
        for problem in found:
            typer.echo(f"  PROBLEM      {problem}")
        problems += found
    if problems:
        raise typer.Exit(1)


def _show(found: InspectedCertificate) -> tuple[str, ...]:
    """Print it; what is wrong with it."""
    from hypha.pki.certificates import fingerprint, is_ca, is_self_signed
    from hypha.pki.inspection import names_in

    certificate, authority = found.certificate, is_ca(found.certificate)
    kind = "node" if not authority else "root CA" if is_self_signed(certificate) else "CA"
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    rows = {
        "certificate": f"{certificate.subject.rfc4514_string()} ({kind})",
        "issuer": certificate.issuer.rfc4514_string(),
        "valid": f"{begins:%Y-%m-%d} to {ends:%Y-%m-%d}",
        "PeerID": found.peer_id or "",
        "roles": "" if authority else ", ".join(sorted(found.roles)) or "none",
        "may issue": ", ".join(sorted(found.may_issue or ())),
        "names": ", ".join(names_in(certificate)),
        "serial": f"{certificate.serial_number:x}",
        "sha256": fingerprint(certificate),
    }
    for name, value in rows.items():
        if value:
            typer.echo(f"  {name:12} {value}")
    for problem in found.problems:
        typer.echo(f"  PROBLEM      {problem}")
    return found.problems


def _made(made: MadeFiles) -> None:
    from hypha.pki.inspection import inspected
    from hypha.pki.issuers import load_certificate

    for path in (made.cert, made.key, made.trust):
        if path is not None:
            typer.echo(f"wrote {path}")
    peer_id = inspected(load_certificate(made.cert)).peer_id
    if peer_id is not None:
        typer.echo(f"PeerID {peer_id}")


def main() -> None:
    run_program(app)


if __name__ == "__main__":
    main()
