"""A framework's hooks → Monitor. Import the one you train with: `ww_monitor.callbacks.lightning`."""
