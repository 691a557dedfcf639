"""What watches a network: rules, dashboards and services, and the programs that write and check them.

``python -m deploy.lint`` holds every PromQL query here and in the documentation against the registry of
metrics, ``python -m deploy.dashboards`` writes the dashboards, ``python -m deploy.tables`` the tables of
docs/observability.md.
"""
