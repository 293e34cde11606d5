"""``python -m gskd.cli``, which launchers of several processes need."""

from gskd.cli import main

if __name__ == "__main__":
    main()
