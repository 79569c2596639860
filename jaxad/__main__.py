"""`python -m jaxad` is `jaxad`."""

from jaxad.cli import main

if __name__ == "__main__":
    main()
