"""What tests ask of corpora."""

from lm.data.corpus import open_splits


def ids(corpus):
    return [document.id for document in corpus]


def texts(corpus):
    return [document.text for document in corpus]


def halves(source, **settings):
    """(train, validation) of a source that is no mix."""
    splits = open_splits(source, None, **settings)
    (component,) = splits.train
    return component.corpus, splits.validation[""]
