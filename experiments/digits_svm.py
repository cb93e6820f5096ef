"""A support-vector machine on the split of the embedded digits, so that the networks' figures mean something.

    python experiments/digits_svm.py      # needs scikit-learn: pip install -e '.[test]'

Prints the accuracy on the 360 test digits of a machine with a radial kernel on the 64 raw pixels: with scikit-learn's defaults,
and with C and gamma chosen by five-fold cross-validation on the 1,437 training digits.
"""

import sklearn
from sklearn.model_selection import GridSearchCV
from sklearn.svm import SVC

from cnnfamily.data import sources


def main() -> None:
    data = sources.load("digits", resolution=8, channels=1)
    train, test = (split.images.reshape(len(split.labels), -1) / 255 for split in (data.train, data.test))
    default = SVC().fit(train, data.train.labels)
    grid = {"C": [1, 3, 10, 30, 100], "gamma": [0.01, 0.03, 0.1, 0.3]}
    search = GridSearchCV(SVC(), grid, cv=5).fit(train, data.train.labels)
    print(f"scikit-learn {sklearn.__version__}, fingerprint {data.fingerprint}, {len(test)} test digits")
    print(f"defaults: {default.score(test, data.test.labels):.4f}")
    print(f"cross-validated, {search.best_params_}: {search.best_estimator_.score(test, data.test.labels):.4f}")


if __name__ == "__main__":
    main()
