"""The dashboards: what each shows, a file each, and beside it what Grafana reads, as JSON.

The JSON is built by `alerts.grafana`, committed, and never edited by hand.
"""
