"""`python -m peftdyno.bench`: the command line, where no script is installed"""

from peftdyno.bench.cli import main

main()
