"""Runtime services: processes, stop signals, files, run lock, log, device, partial results."""
