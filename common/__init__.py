"""Code that every script needs and no codec: files, pictures, weights, processes."""

import os

# libgomp reads this when torch is imported, so scripts import this package, or `config`, first.
# By default its waiting threads spin for a long time. On a machine with other work a step then
# takes twice as long.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "10000"
