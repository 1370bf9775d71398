"""A miniature of GLUE's folder: each task's real columns, with rows of our own that hold what makes them difficult."""

from pathlib import Path

QUOTE = 'She said " no , and left .'  # a quote that nothing closes, as many rows have it
PARSES = ("( a ( b ) )", "( c )", "(ROOT (S a))", "(ROOT (S c))")
MNLI_HEADER = [
    *("index", "promptID", "pairID", "genre", "sentence1_binary_parse", "sentence2_binary_parse"),
    *("sentence1_parse", "sentence2_parse", "sentence1", "sentence2"),
]
STSB_HEADER = ["index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2"]


def write_glue(root):
    """Write all nine tasks and the diagnostic set below `root`; gives it."""
    for write in (_cola, _sst2, _mrpc, _stsb, _qqp, _mnli, _entailment):
        write(Path(root))
    return Path(root)


def write_rows(path, *rows, end="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join("\t".join(map(str, row)) + end for row in rows).encode())


def _cola(root):
    rows = [("ab01", 1, "", "The baker sold it ."), ("ab01", 0, "*", "Them sold it ."), ("cd02", 1, "", QUOTE)]
    write_rows(root / "CoLA/train.tsv", *rows, ("ef03", 0, "*", "Milk the cat drank of ."))
    write_rows(
        root / "CoLA/dev.tsv", ("ab01", 1, "", "The nurse closed the window ."), ("ab01", 0, "*", "Slept she the .")
    )
    write_rows(root / "CoLA/test.tsv", ("index", "sentence"), (0, "Anna walked home ."), (1, "Walked Anna home to ."))


def _sst2(root):
    header = ("sentence", "label")
    write_rows(
        root / "SST-2/train.tsv", header, ("dull from the first scene ", 0), ("a warm little film ", 1), (QUOTE, 0)
    )
    write_rows(root / "SST-2/dev.tsv", header, ("funny and kind . ", 1), ("slow and empty ", 0))
    write_rows(root / "SST-2/test.tsv", ("index", "sentence"), (0, "noise without a plot "), (1, "well worth a look "))


def _mrpc(root):
    header = ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String")
    rows = [
        (1, 101, 201, "The mayor blamed them .", QUOTE),
        (0, 102, 202, "They owned it .", "It fell ."),
    ]
    write_rows(root / "MRPC/train.tsv", header, *rows)
    write_rows(root / "MRPC/dev.tsv", header, (1, 103, 203, "He said so .", "So he said ."))
    test = ("index", "#1 ID", "#2 ID", "#1 String", "#2 String")
    write_rows(root / "MRPC/test.tsv", test, (0, 104, 204, "The price rose .", "Prices went up ."))


def _stsb(root):
    row = ("main-captions", "MSRvid", "2012test", "0001", "none", "none")
    rows = [(0, *row, "A boat leaves .", "A ship leaves .", "5.000"), (1, *row, "A man .", QUOTE, "3.800")]
    write_rows(root / "STS-B/train.tsv", (*STSB_HEADER, "score"), *rows, (2, *row, "Three cats .", "Two dogs .", "0.0"))
    dev = [(0, *row, "A cook with a pan .", "A cook and a pan .", "4.2"), (1, *row, "A road .", "A river .", "0.75")]
    write_rows(root / "STS-B/dev.tsv", (*STSB_HEADER, "score"), *dev)
    write_rows(root / "STS-B/test.tsv", STSB_HEADER, (0, *row, "A boy reads a book .", "A boy holds a book ."))


def _qqp(root):
    header = ("id", "qid1", "qid2", "question1", "question2", "is_duplicate")
    rows = [(1, 11, 12, "How is life ?", QUOTE, 0), (3, 15, 16, "Why ?", "What for ?", 1)]
    broken = (2, 13, 14, "What makes rain")  # the file has a few rows that a line feed cuts in two
    write_rows(root / "QQP/train.tsv", header, rows[0], broken, rows[1])
    write_rows(root / "QQP/dev.tsv", header, (4, 17, 18, "Why so ?", "Why not ?", 0))
    write_rows(
        root / "QQP/test.tsv",
        ("id", "question1", "question2"),
        (0, "Would it rain ?", "Could it rain ?"),
        (1, "A ?", ""),
    )


def _mnli(root):
    def row(number, first, second, *labels):
        return (number, f"{number}x", f"{number}xn", "slate", *PARSES, first, second, *labels)

    train = [*MNLI_HEADER, "label1", "gold_label"]
    dev = [*MNLI_HEADER, *(f"label{number}" for number in range(1, 6)), "gold_label"]
    rows = [
        row(0, "It has two sides .", QUOTE, *["neutral"] * 2),
        row(1, "They lost .", "They won .", *["contradiction"] * 2),
    ]
    write_rows(
        root / "MNLI/train.tsv", train, *rows, row(2, "Our neighbour came .", "Someone came .", *["entailment"] * 2)
    )
    votes = ("contradiction", "neutral", "neutral", "neutral", "entailment", "neutral")
    write_rows(root / "MNLI/dev_matched.tsv", dev, row(0, "The rules are new .", "All know the rules .", *votes))
    write_rows(
        root / "MNLI/dev_mismatched.tsv", dev, row(0, "Thank you for it .", "We are glad of it .", *["entailment"] * 6)
    )
    write_rows(
        root / "MNLI/test_matched.tsv",
        MNLI_HEADER,
        row(0, "Tea is sold here .", "They sell a drink ."),
        row(1, "The hall is old .", "No ."),
    )
    write_rows(root / "MNLI/test_mismatched.tsv", MNLI_HEADER, row(9847, "What do you choose ?", "You should choose ."))
    diagnostic = [(0, "The dog slept .", "It did not sleep ."), (1, "It did not sleep .", "The dog slept .")]
    write_rows(root / "diagnostic/diagnostic.tsv", ("index", "sentence1", "sentence2"), *diagnostic)


def _entailment(root):
    for folder, first, second, words in (
        ("QNLI", "question", "sentence", ("entailment", "not_entailment")),
        ("RTE", "sentence1", "sentence2", ("entailment", "not_entailment")),
        ("WNLI", "sentence1", "sentence2", ("1", "0")),
    ):
        header = ("index", first, second, "label")
        rows = [(0, "When did it end ?", QUOTE, words[1]), (1, "Who ran ?", "The man ran .", words[0])]
        write_rows(root / folder / "train.tsv", header, *rows)
        write_rows(root / folder / "dev.tsv", header, (0, "What came ?", "A law came .", words[0]))
        test = [(0, "What is it ?", "It is a shirt ."), (1, "Is it ?", "It is not .")]
        write_rows(root / folder / "test.tsv", header[:3], *test)
