"""``python -m flanneld``."""

from flanneld.main import console

if __name__ == "__main__":
    console()
