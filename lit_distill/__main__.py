"""`python -m lit_distill` is `lit-distill`."""

from lit_distill.cli import main

main()
