"""``python -m msp_plugin`` is ``msp``."""

from msp_plugin.cli import main

if __name__ == "__main__":
    main()
