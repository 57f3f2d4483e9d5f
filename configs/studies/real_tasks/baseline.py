"""TF-IDF and logistic regression on the study's classification tasks.

python -m configs.studies.real_tasks.baseline --data=DATA
"""

import argparse
import json
import pathlib

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from t5x_lite.data import task_readers, tasks


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    folder = str(parser.parse_args().data / "tasks")
    found = {}
    for name in ("sentence_polarity", "subjectivity"):
        texts, labels = {}, {}
        for split in ("train", "test"):
            rows = task_readers.read(tasks.TASKS[name].source, folder, split)
            texts[split] = [row["sentence"] for row in rows]
            labels[split] = [row["label"] for row in rows]
        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
        model = make_pipeline(words, LogisticRegression(C=10, max_iter=1000))
        model.fit(texts["train"], labels["train"])
        found[name] = float(model.score(texts["test"], labels["test"]))
        print(f"{name}: {found[name]:.4f} of {len(labels['test'])}")
    path = pathlib.Path(__file__).parent / "baseline.json"
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
