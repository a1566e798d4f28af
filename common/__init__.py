"""What every script needs and is not about codecs: files, pictures, weights, processes."""

import os

# libgomp reads this when torch is imported, so scripts import this package, or `config`, first.
# By default its threads spin for long while they wait: on a machine with other work a step takes
# twice as long.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "10000"
