"""`python -m ww_monitor.cli`."""

from ww_monitor.cli import app

if __name__ == "__main__":
    app(prog_name="ww-monitor")
