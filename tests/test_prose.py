"""The prose that `make prose` keeps of documentation: what is text, and what is said only once."""

import conftest  # noqa: F401  first: it puts the program on the path

from klsplice.prose_assets import document, is_new, paragraphs

REST = """
.. _target:

Password management
===================

Use :ref:`HTTPS <ssl>` and the :class:`~django.db.User` object, since *plain* connections
leak what ``secret`` words they carry over `the wire <http://wire.org>`_ to others.

.. code-block:: text

    this code is not a sentence although it has many words, as you can see.

.. note:: A note says what its first line says and
   what its second line says too, in one paragraph.

:param length: how long it is, which is an entry of a list
    and goes on here as a long sentence of more than eight words.

The default is good for nearly all of your users::

    DEFAULT = "this is code too, but it has words as if it were prose."

- an item of a list that is
  continued on the second line of the list
  with its end here.

Empty section
-------------

=====  ==========================
name   what a table says of it.
=====  ==========================
"""


def test_rest_becomes_paragraphs_without_markup_code_tables_and_empty_sections():
    assert paragraphs(REST) == [
        "Password management",
        "Use HTTPS and the User object, since plain connections leak what secret words they carry "
        "over the wire to others.",
        "A note says what its first line says and what its second line says too, in one paragraph.",
        "The default is good for nearly all of your users:",
        "- an item of a list that is continued on the second line of the list with its end here.",
    ]


def test_markdown_becomes_paragraphs_without_fences_links_and_identifiers():
    text = (
        "# A title\n\nSee [the guide](guide.md) if you want **more** than `this page` says.\n\n"
        "```python\nx = 1\nSome code is here and it looks like a whole long sentence.\n```\n\n"
        "Call my_module.run_it(x=1) with foo_bar, spam_eggs and ham_spam as its four args.\n"
    )
    assert paragraphs(text) == [
        "A title",
        "See the guide if you want more than this page says.",
    ]


def test_a_paragraph_said_before_in_nearly_the_same_words_is_not_new():
    words = [f"{a}{b}" for a in "abcdefgh" for b in "klmnopqr"]
    seen = set()
    assert is_new(" ".join(words), seen)
    assert not is_new(" ".join([*words[:40], "changed", *words[41:]]), seen)
    assert is_new(" ".join(reversed(words)), seen)


def test_a_document_that_is_short_or_mostly_a_copy_is_left_out():
    line = "We write {0} because {0} makes this sentence of {0} differ from the one on {0}."
    names = [chr(97 + i % 26) + chr(97 + i // 26) * 3 + "word" for i in range(60)]
    text = "\n\n".join(map(line.format, names))
    seen = set()
    assert document(text, seen) == text
    assert document(text, seen) == ""
    assert document("This is one sentence of more than eight words.", set()) == ""
