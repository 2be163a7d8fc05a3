"""Builds assets/prose.jsonl once: the documentation of the projects in requirements/prose.txt.

English prose, 3M tokens of SmolLM2, a document per file: paragraphs a line each, without mark-up,
code, tables, changelogs, API lists and what another file says too. The documents are shuffled
(SEED), so that any part of the file is of all projects. It comes from their source distributions,
which pip downloads (240 MB) and which are read, not installed. They are under these licences:

  Apache-2.0    aiohttp, certbot, Cython, salt, trio, zuul, and OpenStack (also CC-BY-3.0):
                cinder, horizon, ironic, keystone, kolla-ansible, magnum, manila, mistral, neutron,
                nova, octavia, openstack-heat, sahara, swift, tempest
  BSD           CherryPy, Django, evennia, flask, ipython, jupyterhub, networkx, pyglet, Scrapy,
                Sphinx, sympy; celery, whose documentation is CC-BY-SA-4.0
  MIT           alembic, beets, black, molecule, mypy, Nikola, peewee, pip, pytest, roundup,
                setuptools, SQLAlchemy, Twisted
  GPL           ansible, breezy, buildbot, mailman, mercurial, pylint
  other         docutils (public domain), ZODB (ZPL-2.1)

Takes 5 to 8 minutes on 2 CPU cores, most of it pip's.
"""

import hashlib
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path

from klsplice.demo_assets import ASSETS, write_jsonl

PINS = Path(__file__).resolve().parents[1] / "requirements/prose.txt"
SEED = 0
TEXT = re.compile(r"[^/]+/(?!\.).+/.+\.(rst|md|txt|inc)")  # not what lies at a project's root
SKIP = re.compile(  # parts of paths
    r"release|change|history|whatsnew|news|announce|api-ref|authors|contribut(ors|ions)\b|licen[sc]e"
    r"|thanks|credits|specs/|deprecat|/api/|configuration/tables|samples?/|locale|tests/|egg-info"
    r"|requirements|relnotes|test_data"
)
NOTES = {"note", "warning", "tip", "important", "caution", "attention", "hint", "danger"}
TITLED = {"admonition", "topic", "sidebar", "class", "method", "function", "attribute", "setting"}
TITLED |= {"data", "exception", "module", "automethod", "templatefilter"}  # text below a title
ITEM = re.compile(r"^(?:[-*+•]|#\.|\(?\d{1,3}[.)]|[a-z][.)])\s+")
INLINE = [
    (r"<[/!a-zA-Z][^<>]*>(?!`)|!\[[^\]]*\]\([^)]*\)|\s?\[[#*\w-]+\]_(?!\w)", ""),
    (r"\[([^\]]+)\](?:\([^)]*\)|\[[^\]]*\])", r"\1"),
    (r"(?:\{[\w:.-]+\}|(?::[\w.+-]+)*:)?`([^`<>]+?)\s*<[^<>`]*>`_*", r"\1"),
    (r"(?:\{[\w:.-]+\}|(?::[\w.+-]+)+:)`~[^`]*?([^`.]+)`", r"\1"),
    (r"(?:\{[\w:.-]+\}|(?::[\w.+-]+)+:)`[!.]*([^`]*)`", r"\1"),
    (r"``(.+?)``|`([^`]+)`_*", r"\1\2"),
    (r"(?<![\w*])(\*{1,3})(?=\S)([^*]+?)(?<=\S)\1(?![\w*])", r"\2"),
    (r"\|([\w .-]+)\|_*", r"\1"),
    (r"(?<=[A-Za-z0-9])_{1,2}(?=[\s.,;:!?)]|$)|\\(?=\W)", ""),
    (r"\s+", " "),
]
WORD = re.compile(
    r"[(\"'“‘]*[A-Za-z]?[a-z]+(?:['’-][A-Za-z]?[a-z]+)*[.,;:!?)\"'”’]*|[AI&]|[A-Z]{2,5}[,.]?"
)
DEBRIS = re.compile(r"[|{}=\\^`]|[*_:]{2}|://|>>>")


def blocks(text):
    """The blocks of lines of reST or Markdown that can be prose: no directives, no code."""
    block, first, hangs, floor, fence = [], 0, False, None, None
    for line in [*text.expandtabs().splitlines(), ""]:
        bare = line.strip()
        indent = len(line) - len(line.lstrip())
        if fence:
            fence = None if bare == fence else fence
            continue
        if floor is not None and (not bare or indent > floor):
            continue
        floor = None
        markup = re.match(r"(?:\.\.(?=\s|$)|__ |:::)\s*(?:([\w:-]+)::)?\s*(.*)", bare)
        field = re.match(r":[\w *-]+:(\s|$)", bare)
        fence = (re.match(r"`{3,}|~{3,}(?=\w)", bare) or [None])[0]
        ruler = len(bare) > 1 and not re.search(r"[^\W_]", bare)
        starts = markup or field or fence or ruler or ITEM.match(bare) or bare[:1] in "#<"
        if block and (starts or indent < first or indent > first and not hangs):
            yield block
            block = []
        if markup or field:
            directive = markup[1].split(":")[-1] if markup and markup[1] else ""
            if directive not in NOTES | TITLED:
                floor = indent
            elif directive in NOTES and markup[2]:
                block, first, hangs = [markup[2]], indent, True
        elif bare and not fence and not ruler:
            if not block:
                first, hangs = indent, bool(ITEM.match(bare))
            block.append(re.sub(r"^#+ |:(?=:$)", "", bare))
            if bare.endswith("::"):  # code follows
                yield block
                block, floor = [], indent


def paragraphs(text):
    """The paragraphs of reST or Markdown, a line each, without mark-up; headings and items too."""
    lines = []
    for line in map(" ".join, blocks(text)):
        for pattern, new in INLINE:
            line = re.sub(pattern, new, line)
        line = ITEM.sub("- ", line.strip())
        words = line.removeprefix("- ").split()
        prose = sum(bool(WORD.fullmatch(word)) for word in words) >= 0.9 * len(words)
        ended = len(words) >= 8 and line[-1] in ".?!:)"
        if words and prose and not DEBRIS.search(line) and (is_heading(line) or ended):
            lines.append(line)
    follows = [*map(is_heading, lines[1:]), True]  # a heading of no text goes
    return [line for line, last in zip(lines, follows) if not (last and is_heading(line))]


def is_heading(line):
    return line[0].isupper() and line[-1].isalnum() and len(line.split()) < 10


def is_new(line, seen):
    """Whether most runs of 8 words of line are not in seen, which then has them."""
    words = re.findall(r"[a-z]+", line.lower())
    runs = {zlib.crc32(" ".join(words[i : i + 8]).encode()) for i in range(max(1, len(words) - 7))}
    old = len(runs & seen)
    seen |= runs
    return old <= 0.3 * len(runs)


def document(text, seen):
    """The new prose of a file, or "" where it is mostly not new or short."""
    lines = paragraphs(text)
    kept = "\n\n".join(line for line in lines if is_heading(line) or is_new(line, seen))
    return kept if len(kept) >= max(1500, 0.7 * sum(map(len, lines))) else ""


def download(folder):
    """The source distributions that PINS lists, downloaded to folder: their paths, sorted."""
    for pin in re.findall(r"^[\w.-]+==.+", PINS.read_text(), re.MULTILINE):
        # One by one: --no-binary holds for what pip installs to build a project, too.
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder]
        if subprocess.run([*pip, "--no-binary", pin.split("==")[0], pin]).returncode:
            print(f"error: pip could not download {pin}\nhint: see its message", file=sys.stderr)
            sys.exit(2)
        print(f"downloaded {pin}", flush=True)
    return sorted(Path(folder).glob("*.tar.gz"))


def documents(sources):
    """The documents of source distributions, in their order, without near-duplicates."""
    seen = set()
    for source in sources:
        found = []
        with tarfile.open(source) as archive:
            for member in sorted(archive.getmembers(), key=lambda member: member.name):
                name = member.name
                if member.isfile() and TEXT.fullmatch(name) and not SKIP.search(name.lower()):
                    text = archive.extractfile(member).read().decode(errors="replace")
                    found.append(document(text, seen))
        print(f"{source.name}: {sum(map(len, found)):,} characters")
        yield from filter(None, found)


def main():
    target = ASSETS / "prose.jsonl"
    if target.exists():
        print(f"{target.relative_to(ASSETS.parent)} is complete")
        return
    ASSETS.mkdir(exist_ok=True)
    # A killed build leaves a hidden .prose-* folder, never a half-written target.
    with tempfile.TemporaryDirectory(prefix=".prose-", dir=ASSETS) as temporary:
        found = list(documents(download(temporary)))
        random.Random(SEED).shuffle(found)
        build = Path(temporary) / target.name
        write_jsonl(build, found)
        digest = f"{hashlib.sha256(build.read_bytes()).hexdigest()}  {target.name}\n"
        (ASSETS / "prose.SHA256").write_text(digest)
        print(digest, end="")
        build.rename(target)


if __name__ == "__main__":
    main()
