"""What the caches do, for those who watch: Prometheus metrics and a Grafana dashboard."""
