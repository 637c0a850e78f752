"""What every process needs: distributed, signals, files, log, device."""
