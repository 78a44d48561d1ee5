"""What operators see: log lines, metrics, traces."""
