"""Speed and memory against what else there is; docs/performance.md has the figures."""
