"""GLUE's files as they are handed around, in small: columns, labels, and what is odd about each."""

import json

import pytest

from bert_fast.data.catalogue import DATASETS, read
from bert_fast.data.classification import NO_LABEL
from bert_fast.data.tables import WRONG_NUMBER_OF_COLUMNS

#: Of `datasets/glue/glue.py` of huggingface/datasets (commit 02bb18c): `label_classes` in their order.
LABEL_CLASSES = {
    "cola": ("unacceptable", "acceptable"),
    "sst2": ("negative", "positive"),
    "mrpc": ("not_equivalent", "equivalent"),
    "qqp": ("not_duplicate", "duplicate"),
    "stsb": (),
    "mnli": ("entailment", "neutral", "contradiction"),
    "qnli": ("entailment", "not_entailment"),
    "rte": ("entailment", "not_entailment"),
    "wnli": ("not_entailment", "entailment"),
}
#: Of the same file: `text_features`, the names of the exports' columns.
TEXT_FEATURES = {
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "mrpc": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "stsb": ("sentence1", "sentence2"),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
    "ax": ("premise", "hypothesis"),
}
#: Lines as in the train.tsv or dev.tsv of GLUE's zip files -> texts and label.
TRAIN = {
    "cola": (None, ["gj04\t1\t\tA noun.", "gj04\t0\t*\tNoun a."], [("A noun.", None), ("Noun a.", None)]),
    "sst2": ("sentence\tlabel", ["so dull \t0", '"fine \t1'], [("so dull ", None), ('"fine ', None)]),
    "mrpc": (
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        ["1\t10\t20\tOne .\tUno .", "0\t11\t21\tTwo .\tDos ."],
        [("One .", "Uno ."), ("Two .", "Dos .")],
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        ["133\t1\t2\tWhy?\tHow come?\t1", "134\t3\t4\tWho?\tWhen?\t0"],
        [("Why?", "How come?"), ("Who?", "When?")],
    ),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        ["0\tg\tf\t2012\t1\tn\tn\tA plane.\tA jet.\t5.000", "1\tg\tf\t2012\t4\tn\tn\tA man.\tA cat.\t0.8"],
        [("A plane.", "A jet."), ("A man.", "A cat.")],
    ),
    "mnli": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
        "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
        [
            "0\t3\t3n\tg\t( P )\t( H )\t(R P)\t(R H)\tIt rains.\tIt is wet.\tneutral\tentailment",
            "1\t4\t4c\tg\t( P )\t( H )\t(R P)\t(R H)\tHe ran.\tHe sat.\tneutral\tcontradiction",
        ],
        [("It rains.", "It is wet."), ("He ran.", "He sat.")],
    ),
    "qnli": (
        "index\tquestion\tsentence\tlabel",
        ["0\tWho?\tAnn did.\tentailment", "1\tWhen?\tIt rained.\tnot_entailment"],
        [("Who?", "Ann did."), ("When?", "It rained.")],
    ),
    "rte": (
        "index\tsentence1\tsentence2\tlabel",
        ["0\tA. B.\tA.\tentailment", "1\tC.\tD.\tnot_entailment"],
        [("A. B.", "A."), ("C.", "D.")],
    ),
    "wnli": (
        "index\tsentence1\tsentence2\tlabel",
        ["0\tA it.\tA b.\t1", "1\tC it.\tC d.\t0"],
        [("A it.", "A b."), ("C it.", "C d.")],
    ),
}
LABELS = {
    "cola": ["acceptable", "unacceptable"],
    "sst2": ["negative", "positive"],
    "mrpc": ["equivalent", "not_equivalent"],
    "qqp": ["duplicate", "not_duplicate"],
    "stsb": [5.0, 0.8],
    "mnli": ["entailment", "contradiction"],
    "qnli": ["entailment", "not_entailment"],
    "rte": ["entailment", "not_entailment"],
    "wnli": ["entailment", "not_entailment"],
}
#: The test.tsv of GLUE: no labels, and some have other columns.
TEST = {
    "cola": "index\tsentence\n0\tA?\n",
    "sst2": "index\tsentence\n0\tA?\n",
    "mrpc": "\ufeffindex\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t1\t2\tA?\tB?\n",
    "qqp": "id\tquestion1\tquestion2\n0\tA?\tB?\n",
    "stsb": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\n"
    "0\tg\tf\t9\t1\tn\tn\tA?\tB?\n",
    "mnli": "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
    "sentence2_parse\tsentence1\tsentence2\n0\t1\t1\tg\tp\tp\tp\tp\tA?\tB?\n",
    "qnli": "index\tquestion\tsentence\n0\tA?\tB?\n",
    "rte": "index\tsentence1\tsentence2\n0\tA?\tB?\n",
    "wnli": "index\tsentence1\tsentence2\n0\tA?\tB?\n",
    "ax": "index\tsentence1\tsentence2\n0\tA?\tB?\n",
}


def lines(name):
    header, rows, _ = TRAIN[name]
    return "\n".join(([header] if header else []) + rows) + "\n"


def said(found):
    return [(example.id, example.text, example.text_pair, example.label) for example in found.examples]


@pytest.mark.parametrize("name", TRAIN)
def test_labels_and_columns_are_those_of_datasets(name):
    dataset = DATASETS[name]
    assert dataset.labels == LABEL_CLASSES[name]
    layout = dataset.columns[0]
    assert tuple(layout[role] for role in ("text", "text_pair") if role in layout) == TEXT_FEATURES[name]
    assert layout["label"] == "label"


@pytest.mark.parametrize("name", TRAIN)
def test_the_official_training_file(tmp_path, name):
    (tmp_path / "train.tsv").write_text(lines(name), encoding="utf-8")
    found = read(name, tmp_path, split="train", labelled=True)
    texts = TRAIN[name][2]
    assert said(found) == [
        (str(place), *pair, label) for place, (pair, label) in enumerate(zip(texts, LABELS[name], strict=True))
    ]
    assert found.skipped == {}


@pytest.mark.parametrize("name", TEST)
def test_the_official_test_file(tmp_path, name):
    (tmp_path / DATASETS[name].splits["test"][0]).write_text(TEST[name], encoding="utf-8")
    found = read(name, tmp_path, split="test")
    pair = "B?" if len(TEXT_FEATURES[name]) == 2 else None
    assert said(found) == [("0", "A?", pair, None)]
    with pytest.raises(ValueError, match="has no column"):
        read(name, tmp_path, split="test", labelled=True)


@pytest.mark.parametrize("name", TRAIN)
def test_the_exports_of_datasets(tmp_path, name):
    """`Dataset.to_json`: numbers of labels, and -1 where there is none."""
    texts, names = TRAIN[name][2], LABELS[name]
    rows = []
    for place, (pair, label) in enumerate(zip(texts, names, strict=True)):
        columns = dict(zip(TEXT_FEATURES[name], pair, strict=False))
        number = label if isinstance(label, float) else DATASETS[name].labels.index(label)
        rows.append({**columns, "label": number, "idx": place + 5})
    path = tmp_path / next(file for file in DATASETS[name].splits["validation"] if file.endswith(".jsonl"))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read(name, tmp_path, split="validation", labelled=True)
    assert said(found) == [
        (str(place + 5), *pair, label) for place, (pair, label) in enumerate(zip(texts, names, strict=True))
    ]
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps({**rows[0], "label": -1.0 if name == "stsb" else -1}) + "\n")
    assert read(name, path).examples[0].label is None
    with pytest.raises(ValueError, match=r"line 1: column 'label' is -1.*, expected a label"):
        read(name, path, labelled=True)


def test_the_diagnostic_pairs_with_and_without_labels(tmp_path):
    """`diagnostic-full.tsv` has columns of its own, Hugging Face's export -1 for all labels."""
    path = tmp_path / "diagnostic-full.tsv"
    path.write_text("Lexical Semantics\tDomain\tPremise\tHypothesis\tLabel\nQuantifiers\tNews\tA.\tB.\tneutral\n")
    assert said(read("ax", path, split="test", labelled=True)) == [("0", "A.", "B.", "neutral")]
    path = tmp_path / "test.jsonl"
    path.write_text('{"premise": "A.", "hypothesis": "B.", "label": -1, "idx": 0}\n')
    assert said(read("ax", path, split="test")) == [("0", "A.", "B.", None)]


def test_qqp_has_rows_that_are_cut(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text(lines("qqp") + "135\t5\t6\tBroken\n?\t1\n136\t7\t8\tA\tB\t0\n")
    found = read("qqp", path, labelled=True)
    assert [example.text for example in found.examples] == ["Why?", "Who?", "A"]
    assert found.skipped == {WRONG_NUMBER_OF_COLUMNS: 2}
    assert [example.id for example in found.examples] == ["0", "1", "4"]  # places in the file, as submissions count
    path.write_text(lines("rte") + "2\tE.\tentailment\n")
    with pytest.raises(ValueError, match="line 4 has 3 columns, expected 4"):
        read("rte", path)


def test_mnli_without_agreement_and_both_validations(tmp_path):
    header, rows, _ = TRAIN["mnli"]
    undecided = rows[0].replace("entailment", "-")
    (tmp_path / "dev_matched.tsv").write_text("\n".join([header, rows[0], undecided]))
    (tmp_path / "dev_mismatched.tsv").write_text("\n".join([header, rows[1]]))
    found = read("mnli", tmp_path, split="validation", labelled=True)
    assert ([example.label for example in found.examples], found.skipped) == (["entailment"], {NO_LABEL: 1})
    kept = read("mnli", tmp_path, split="validation")
    assert ([example.label for example in kept.examples], kept.skipped) == (["entailment", None], {})
    assert read("mnli", tmp_path, split="validation_mismatched").examples[0].label == "contradiction"


def test_mrpc_as_microsoft_has_it(tmp_path):
    """One file holds training and validation, and GLUE says by ids which is which."""
    (tmp_path / "msr_paraphrase_train.txt").write_text(lines("mrpc"), encoding="utf-8")
    (tmp_path / "msr_paraphrase_test.txt").write_text(lines("mrpc").replace("\n", "\r\n"), encoding="utf-8")
    assert len(read("mrpc", tmp_path).examples) == 2
    with pytest.raises(ValueError, match=r"the split 'validation' only with dev_ids.tsv or mrpc_dev_ids.tsv beside it"):
        read("mrpc", tmp_path, split="validation")
    (tmp_path / "mrpc_dev_ids.tsv").write_text("11\t21\n")
    (tmp_path / "msr_paraphrase_train.copy.txt").write_text("Quality\t#1 String\t#2 String\n1\tOne .\tTwo .\n")
    with pytest.raises(ValueError, match=r"copy.txt has no column '#1 ID'; it has: 'Quality', "):
        read("mrpc", tmp_path / "msr_paraphrase_train.copy.txt")
    assert [example.text for example in read("mrpc", tmp_path).examples] == ["One ."]
    assert [example.text for example in read("mrpc", tmp_path, split="validation").examples] == ["Two ."]
    assert [example.label for example in read("mrpc", tmp_path, split="test").examples] == LABELS["mrpc"]


def test_cola_of_its_own_distribution(tmp_path):
    (tmp_path / "in_domain_train.tsv").write_text(lines("cola"))
    assert len(read("cola", tmp_path).examples) == 2
    (tmp_path / "train.tsv").write_text(lines("cola") + "gj04\t1\tno star\n")
    with pytest.raises(ValueError, match="line 3 has 3 columns, expected 4: source, label, star, sentence"):
        read("cola", tmp_path)


def test_what_is_refused(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("index\tsentence1\tsentence2\tlabel\n0\ta\tb\tmaybe\n")
    with pytest.raises(ValueError, match="line 2: column 'label' is 'maybe', expected one of: entailment, not_entail"):
        read("rte", path)
    path.write_text("index\tsentence1\tsentence2\tlabel\n0\ta\tb\t2\n")
    with pytest.raises(ValueError, match="is '2', expected one of"):
        read("rte", path)
    path.write_text("index\tfirst\tsecond\tlabel\n0\ta\tb\t1\n")
    with pytest.raises(ValueError, match="has no column 'sentence1'; it has: 'index', 'first', 'second', 'label'"):
        read("wnli", path)
    with pytest.raises(ValueError, match=r"has no file of the split 'test' of wnli; looked for: test.tsv, "):
        read("wnli", tmp_path, split="test")
    with pytest.raises(ValueError, match="wnli has no split 'dev'; it has: train, validation, test"):
        read("wnli", tmp_path, split="dev")
    with pytest.raises(ValueError, match="problem is 'multi', but wnli is 'single'"):
        read("wnli", tmp_path, problem="multi", columns={"text": "first"})
    path.write_text("sentence1\tsentence2\tscore\na\tb\thigh\n")
    with pytest.raises(ValueError, match="line 2: column 'score' is 'high', expected a number"):
        read("stsb", path)
