"""Real text that every Debian machine can fetch: documentation, sources, proofs and poems out of packages.

The packages are downloaded and unpacked into a folder, not installed; nothing of them is part of the project.
"""

import gzip
import html
import json
import lzma
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

from data_prep.errors import UserError

# Source -> package -> endings of the files whose text is taken.
DEBIAN_PACKAGES: dict[str, dict[str, tuple[str, ...]]] = {
    "slimpajama": {
        "linux-doc-6.1": (".html",),
        "dict-gcide": (".dict.dz",),
        "dict-wn": (".dict.dz",),
        "libreoffice-help-en-us": (".html",),
        "gimp-help-en": (".html",),
        "postgresql-doc-15": (".html",),
        "sqlite3-doc": (".html",),
        "cmake-doc": (".html",),
        "erlang-doc": (".html",),
        "openjdk-17-doc": (".html",),
        "libboost1.81-doc": (".html",),
        "rust-doc": (".html",),
        "python3.11-doc": (".html",),
        "ghc-doc": (".html",),
        "singular-doc": (".html",),
    },
    "starcoder": {
        "golang-1.19-src": (".go",),
        "rust-src": (".rs",),
        "linux-source-6.1": (".tar.xz",),
    },
    "proof_pile_2": {
        "metamath-databases": (".mm",),
        "acl2-books-source": (".lisp", ".lsp", ".acl2"),
        "agda-stdlib": (".agda",),
        "coq": (".v",),
        "libcoq-stdlib": (".v",),
        "libcoq-mathcomp-algebra": (".v",),
        "libcoq-mathcomp-analysis": (".v",),
        "libcoq-unimath": (".v",),
        "libcoq-hott": (".v",),
        "libcoq-iris": (".v",),
        "libcoq-corn": (".v",),
        "hol-light": (".ml", ".hl"),
        "macaulay2-common": (".m2", ".html"),
        "maxima-share": (".mac", ".lisp", ".dem"),
        "gap-doc": (".html", ".xml"),
        "why3-examples": (".mlw",),
    },
    "wudao": {
        "libreoffice-help-zh-cn": (".html",),
        "libreoffice-help-zh-tw": (".html",),
        "gimp-help-zh-cn": (".html",),
        "debian-reference-zh-cn": (".html",),
        "kicad-doc-zh": (".html",),
        "manpages-zh": (".gz",),
    },
}
POEMS = "chinese-poetry@2.0.1"  # from npm: classical poems, 100 MB
LANGUAGES = {
    ".go": "go",
    ".rs": "rust",
    ".c": "c",
    ".h": "c",
    ".S": "assembly",
    ".py": "python",
    ".sh": "shell",
}
SPLIT_CHARACTERS = 12_000  # databases and dictionaries are one file each; a document is a piece of one
POEMS_CHARACTERS = 1_200
MINIMUM_CHARACTERS = 80
TAGS = re.compile(r"<(script|style|head|nav)\b.*?</\1>|<[^>]+>", re.DOTALL | re.IGNORECASE)
BLANK_LINES = re.compile(r"\n\s*\n\s*\n+")


def fetch_packages(folder: Path) -> None:
    """Download and unpack whatever is not there yet. Raises UserError where a package manager fails."""
    for packages in DEBIAN_PACKAGES.values():
        for name in packages:
            if not (folder / name).is_dir():
                _unpack_debian(name, folder)
    if not (folder / "poems").is_dir():
        _unpack_poems(folder)


def _run(*command: str, folder: Path) -> str:
    try:
        return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", "") or str(error)
        raise UserError(
            f"{' '.join(command)} failed ({' '.join(detail.split())[-300:]}); run apt-get update, "
            "or give a corpus of your own with --corpora"
        ) from error


def _unpack_debian(name: str, folder: Path) -> None:
    temporary = folder / f"{name}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    _run("apt-get", "download", "-q", name, folder=temporary)
    archive = next(temporary.glob("*.deb"))
    _run("dpkg-deb", "-x", archive.name, ".", folder=temporary)
    archive.unlink()
    temporary.rename(folder / name)


def _unpack_poems(folder: Path) -> None:
    temporary = folder / "poems.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    archive = _run("npm", "pack", "--silent", POEMS, folder=temporary).strip().splitlines()[-1]
    _run("tar", "-xzf", archive, folder=temporary)
    (temporary / archive).unlink()
    temporary.rename(folder / "poems")


def documents(source: str, folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (kind, text) of every document: for code the language, for the others the package."""
    for package, endings in DEBIAN_PACKAGES[source].items():
        for path in sorted((folder / package).rglob("*")):
            if path.name.endswith(endings) and path.is_file() and not path.is_symlink():
                yield from _documents_of(package, path)
    if source == "wudao":
        yield from (("poems", text) for text in _poems(folder / "poems"))


def _documents_of(package: str, path: Path) -> Iterator[tuple[str, str]]:
    if path.name.endswith(".tar.xz"):
        yield from _tar_members(path)
        return
    data = gzip.decompress(path.read_bytes()) if path.suffix in (".gz", ".dz") else path.read_bytes()
    text = data.decode("utf-8", errors="replace")
    if path.suffix == ".html":
        text = BLANK_LINES.sub("\n\n", html.unescape(TAGS.sub("", text))).strip()
    pieces = range(0, len(text), SPLIT_CHARACTERS) if path.suffix in (".mm", ".dz") else (0,)
    size = SPLIT_CHARACTERS if len(pieces) > 1 else len(text)
    for start in pieces:
        if len(piece := text[start : start + size]) >= MINIMUM_CHARACTERS:
            yield LANGUAGES.get(path.suffix, package), piece


def _tar_members(path: Path) -> Iterator[tuple[str, str]]:
    with lzma.open(path) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            language = LANGUAGES.get(Path(member.name).suffix)
            if member.isfile() and language and (file := archive.extractfile(member)):
                text = file.read().decode("utf-8", errors="replace")
                if len(text) >= MINIMUM_CHARACTERS:
                    yield language, text


def _poems(folder: Path) -> Iterator[str]:
    """Several poems a document, with title and author."""
    for path in sorted(folder.rglob("*.json")):
        try:
            poems = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        collected = ""
        for poem in poems if isinstance(poems, list) else []:
            lines = poem.get("paragraphs", poem.get("content", [])) if isinstance(poem, dict) else []
            if isinstance(lines, list) and all(isinstance(line, str) for line in lines):
                collected += "\n".join(
                    [str(poem.get("title", "")), str(poem.get("author", "")), *lines, "", ""]
                )
            if len(collected) >= POEMS_CHARACTERS:
                yield collected
                collected = ""
