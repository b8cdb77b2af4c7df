"""``python -m cpt_lightning`` is ``cpt``."""

from cpt_lightning.cli import main

if __name__ == "__main__":
    main()
