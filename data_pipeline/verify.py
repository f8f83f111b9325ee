"""Check token files against their manifests: ``python -m data_pipeline.verify PREFIX... [--deep]``."""

import argparse

from data_pipeline.manifest import check_prefix, describe
from looplm.cli import UserError, run_main


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.verify", description=__doc__)
    parser.add_argument("prefix", nargs="+", help="path without .bin / .idx, as in data.train of a training config")
    parser.add_argument("--deep", action="store_true", help="read everything: hashes, ids, document ends")
    arguments = parser.parse_args(argv)
    faults = []
    for prefix in arguments.prefix:
        try:
            found = check_prefix(prefix, deep=arguments.deep)
            fingerprint = found.fingerprint[:16]
            print(f"{prefix}: whole, {describe(found)}, fingerprint {fingerprint}")
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError("\nerror: ".join(faults))


if __name__ == "__main__":
    run_main(main)
