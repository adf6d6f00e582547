"""Runs in scikit-learn's environment: fits IncrementalPCA to FOLDER/tokens.npy on request.

stdin, a line each:  COMPONENTS BATCH     stdout: a line when it is done; FOLDER/found.npz holds what came out
"""

import sys
import warnings
from pathlib import Path

import numpy as np
from sklearn.decomposition import IncrementalPCA


def main() -> None:
    folder = Path(sys.argv[1])
    x_ND = np.load(folder / "tokens.npy")
    warnings.simplefilter("ignore")
    print("ready", flush=True)
    for line in sys.stdin:
        components, batch = map(int, line.split())
        pca = IncrementalPCA(n_components=components, batch_size=batch).fit(x_ND)
        np.savez(folder / "found.npz", directions=pca.components_.T, variances=pca.explained_variance_)
        print("done", flush=True)


if __name__ == "__main__":
    main()
