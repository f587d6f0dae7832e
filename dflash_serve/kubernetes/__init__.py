"""The generated parts of k8s/: the Serve configuration with the limits that must agree with it (`serve`), and what
Prometheus and Grafana get (`monitoring`). `python -m dflash_serve.kubernetes` writes them; a test compares."""
