"""Raters, what each was shown in which order, and their answers: one SQLite file, safe with many raters at once.

Nothing of a person is stored: no name, no address, no time. A rater is a number and a random token, with which only he or she
can go on.
"""

from __future__ import annotations

import random
import secrets
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from coz.apps.study_material import Material
from coz.errors import UserError
from coz.store import explain_write_errors
from coz.study_analysis import Rating

PARTS = ("image", "text")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS study (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS raters (id INTEGER PRIMARY KEY, token TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS shown (
  rater INTEGER NOT NULL REFERENCES raters(id), page INTEGER NOT NULL, place INTEGER NOT NULL,
  part TEXT NOT NULL, photo TEXT NOT NULL, condition TEXT NOT NULL,
  PRIMARY KEY (rater, page, place));
CREATE INDEX IF NOT EXISTS shown_photos ON shown (part, photo);
CREATE TABLE IF NOT EXISTS ratings (
  rater INTEGER NOT NULL, page INTEGER NOT NULL, place INTEGER NOT NULL,
  score INTEGER NOT NULL CHECK (score BETWEEN 1 AND 5),
  PRIMARY KEY (rater, page, place),
  FOREIGN KEY (rater, page, place) REFERENCES shown (rater, page, place));
"""


@dataclass(frozen=True)
class Shown:
    """One thing to rate: a place on a page."""

    page: int
    place: int
    part: str
    photo: str
    condition: str
    score: int | None


class StudyStore:
    """The study's file. Each call opens its own connection, so that it may come from any thread or process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with explain_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with self._connect() as database:
            database.executescript(_SCHEMA)

    @contextmanager
    def _connect(self, *, write: bool = False) -> Iterator[sqlite3.Connection]:
        try:
            database = sqlite3.connect(self.path, timeout=30, isolation_level=None)
        except sqlite3.OperationalError as error:
            raise UserError(f"cannot open {self.path} ({error}); choose another --database") from error
        try:
            database.execute("PRAGMA journal_mode = WAL")  # readers go on while somebody writes
            database.execute("PRAGMA foreign_keys = ON")
            if write:
                database.execute("BEGIN IMMEDIATE")  # waits for its turn instead of failing half-way
            yield database
            if write:
                database.execute("COMMIT")
        except sqlite3.DatabaseError as error:
            if "not a database" in str(error):
                raise UserError(f"{self.path} is no SQLite file; choose another --database") from error
            raise
        finally:
            database.close()  # an open transaction is rolled back

    def bind(self, material: Material) -> None:
        """Tie the file to its material; a study goes on with the same pictures only.

        Raises:
            UserError: the file belongs to another study.
        """
        with self._connect(write=True) as database:
            mine = {"identity": material.identity, "conditions": "\n".join(material.conditions)}
            for name, value in mine.items():
                database.execute("INSERT OR IGNORE INTO study VALUES (?, ?)", (name, value))
            stored = dict(database.execute("SELECT name, value FROM study"))
        if stored != mine:
            raise UserError(f"{self.path} holds the answers of a study with other pictures; choose another --database")

    @property
    def conditions(self) -> list[str]:
        """The conditions in their order; none in a new file."""
        with self._connect() as database:
            row = database.execute("SELECT value FROM study WHERE name = 'conditions'").fetchone()
        return row[0].split("\n") if row else []

    def enrol(self, material: Material, *, sets: Mapping[str, int]) -> str:
        """A new rater with what to show. → the token.

        Photographs that few have seen come first, chance decides between equals; the two parts use different ones as far
        as there are enough. The conditions of a page stand in random order.

        Args:
            sets: part → pages.
        """
        token, chance = secrets.token_urlsafe(16), random.SystemRandom()
        with self._connect(write=True) as database:
            rater = database.execute("INSERT INTO raters (token) VALUES (?)", (token,)).lastrowid
            page, used = 0, set[str]()
            for part in PARTS:
                counts = dict(
                    database.execute("SELECT photo, COUNT(*) FROM shown WHERE part = ? GROUP BY photo", (part,)).fetchall()
                )
                photos = material.photos if part == "image" else material.texts
                ranked = sorted(photos, key=lambda photo: (photo in used, counts.get(photo, 0), chance.random()))
                chosen = ranked[: sets[part]]
                chance.shuffle(chosen)
                used.update(chosen)
                for photo in chosen:
                    order = chance.sample(material.conditions, len(material.conditions))
                    rows = [(rater, page, place, part, photo, condition) for place, condition in enumerate(order)]
                    database.executemany("INSERT INTO shown VALUES (?, ?, ?, ?, ?, ?)", rows)
                    page += 1
        return token

    def shown(self, token: str) -> list[Shown]:
        """What a rater is shown, in order, with the answers so far; empty for an unknown token."""
        query = """SELECT page, place, part, photo, condition, score FROM shown LEFT JOIN ratings USING (rater, page, place)
                   WHERE rater = (SELECT id FROM raters WHERE token = ?) ORDER BY page, place"""
        with self._connect() as database:
            return [Shown(*row) for row in database.execute(query, (token,))]

    def rate(self, token: str, page: int, scores: Sequence[int]) -> None:
        """Keep a page's answers, all of them or none; a second answer takes the first one's place.

        Raises:
            ValueError: scores that are not 1 to 5, or not one for each place, or no such page or token.
        """
        with self._connect(write=True) as database:
            query = """SELECT rater, place FROM shown WHERE page = ? AND rater = (SELECT id FROM raters WHERE token = ?)
                       ORDER BY place"""
            places = database.execute(query, (page, token)).fetchall()
            if not places or len(places) != len(scores) or any(score not in range(1, 6) for score in scores):
                raise ValueError(f"page {page} takes {len(places)} scores from 1 to 5, got {list(scores)}")
            rows = [(rater, page, place, score) for (rater, place), score in zip(places, scores, strict=True)]
            database.executemany("INSERT OR REPLACE INTO ratings VALUES (?, ?, ?, ?)", rows)

    def ratings(self) -> list[Rating]:
        """All answers, without tokens."""
        query = """SELECT rater, part, photo, condition, score FROM ratings JOIN shown USING (rater, page, place)
                   ORDER BY rater, page, place"""
        with self._connect() as database:
            return [Rating(*row) for row in database.execute(query)]
