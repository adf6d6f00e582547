"""`submit.py THREADS MEGABYTES GPUS SCRIPT`: starts a Kubernetes Job that runs Snakemake's job script, and prints its name.

The Job is that of pod.yaml, with the image and the claim of the variables NESTED_IMAGE and NESTED_CLAIM.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from ruamel.yaml import YAML

POD = Path(__file__).with_name("pod.yaml")


def main(threads: str, megabytes: str, gpus: str, script: str) -> int:
    """Hand the Job to kubectl; its exit code."""
    job = YAML(typ="safe").load(POD)
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    container["image"] = os.environ["NESTED_IMAGE"]
    container["command"] = ["sh", script]
    container["resources"]["requests"] |= {"cpu": int(threads), "memory": f"{megabytes}M"}
    container["resources"]["limits"] |= {"memory": f"{megabytes}M"}
    if int(gpus):
        container["resources"]["limits"]["nvidia.com/gpu"] = int(gpus)
    pod["volumes"][0]["persistentVolumeClaim"]["claimName"] = os.environ["NESTED_CLAIM"]
    return subprocess.run(
        ["kubectl", "create", "-f", "-", "-o", "name"], input=json.dumps(job), text=True, check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
