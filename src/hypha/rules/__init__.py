"""What several components judge alike: leases, amounts of resources, contributions, manifests. Pure."""
