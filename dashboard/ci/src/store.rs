//! The database: one SQLite file. One process writes at a time; any number read meanwhile (write-ahead log).

mod write;

use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, OpenFlags, OptionalExtension as _};

use crate::error::{Error, Result};

pub use write::{Point, RunToStore, StoredJob, TestResult};
pub(crate) use write::{counts_as, set_fact};

/// The schema, step by step: never changed, only added to.
const MIGRATIONS: [&str; 1] = [include_str!("../migrations/0001.sql")];

/// An open database.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    pub(crate) connection: Connection,
}

impl Store {
    /// Opens the database to write, makes it where there is none, and brings an older schema to today's.
    ///
    /// # Errors
    /// [`Error::Newer`] where a newer program wrote it, [`Error::Database`] otherwise.
    pub fn open(path: &Path) -> Result<Self> {
        let connection = Connection::open(path).map_err(|source| Error::Database { path: path.to_owned(), source })?;
        let mut store = Self { path: path.to_owned(), connection };
        store.run(|connection| {
            connection.busy_timeout(Duration::from_secs(30))?;
            connection.pragma_update(None, "journal_mode", "WAL")?;
            connection.pragma_update(None, "synchronous", "FULL")?;
            connection.pragma_update(None, "foreign_keys", true)?;
            connection.pragma_update(None, "cache_size", -65_536)
        })?;
        store.migrate()?;
        Ok(store)
    }

    /// Opens the database to read.
    ///
    /// # Errors
    /// As [`Self::open`]; also where there is none.
    pub fn open_to_read(path: &Path) -> Result<Self> {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(path, flags)
            .map_err(|source| Error::Database { path: path.to_owned(), source })?;
        let store = Self { path: path.to_owned(), connection };
        store.read(|connection| {
            connection.busy_timeout(Duration::from_secs(5))?;
            connection.pragma_update(None, "query_only", true)?;
            connection.pragma_update(None, "cache_size", -4_096)
        })?;
        let found = store.version()?;
        let known = MIGRATIONS.len() as i64;
        match found {
            found if found > known => Err(Error::Newer { path: path.to_owned(), found, known }),
            found if found < known => {
                Err(Error::Missing(format!("schema {known} in {}: collect once to bring it there", path.display())))
            }
            _ => Ok(store),
        }
    }

    /// Where it lies.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn version(&self) -> Result<i64> {
        self.read(|connection| connection.pragma_query_value(None, "user_version", |row| row.get(0)))
    }

    fn migrate(&mut self) -> Result<()> {
        let (found, known) = (self.version()?, MIGRATIONS.len() as i64);
        if found > known {
            return Err(Error::Newer { path: self.path.clone(), found, known });
        }
        let missing = MIGRATIONS.iter().enumerate().skip(usize::try_from(found).unwrap_or(0));
        for (number, migration) in missing {
            self.change(|transaction| {
                // Another one may have come first.
                let version: i64 = transaction.pragma_query_value(None, "user_version", |row| row.get(0))?;
                if version > number as i64 {
                    return Ok(());
                }
                transaction.execute_batch(migration)?;
                transaction.pragma_update(None, "user_version", number as i64 + 1)
            })?;
        }
        Ok(())
    }

    /// Reads.
    ///
    /// # Errors
    /// [`Error::Database`].
    pub fn read<T>(&self, read: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Result<T> {
        read(&self.connection).map_err(|source| Error::Database { path: self.path.clone(), source })
    }

    fn run<T>(&mut self, run: impl FnOnce(&mut Connection) -> rusqlite::Result<T>) -> Result<T> {
        run(&mut self.connection).map_err(|source| Error::Database { path: self.path.clone(), source })
    }

    /// Changes all of something or nothing: what fails, on a full disk say, leaves what was stored before.
    ///
    /// # Errors
    /// [`Error::Database`].
    pub fn change<T>(&mut self, change: impl FnOnce(&rusqlite::Transaction<'_>) -> rusqlite::Result<T>) -> Result<T> {
        self.run(|connection| {
            let transaction = connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
            let value = change(&transaction)?;
            transaction.commit()?;
            Ok(value)
        })
    }

    /// A fact of the whole database: when it was collected, for one.
    ///
    /// # Errors
    /// [`Error::Database`].
    pub fn fact(&self, name: &str) -> Result<Option<String>> {
        self.read(|connection| {
            connection.query_row("SELECT value FROM fact WHERE name = ?1", [name], |row| row.get(0)).optional()
        })
    }

    /// Says a fact.
    ///
    /// # Errors
    /// [`Error::Database`].
    pub fn set_fact(&mut self, name: &str, value: &str) -> Result<()> {
        self.change(|transaction| write::set_fact(transaction, name, value))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn new() -> (tempfile::TempDir, Store) {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("ci.db")).unwrap();
        (folder, store)
    }

    #[test]
    fn a_database_of_a_newer_program_is_left_alone() {
        let (_folder, mut store) = new();
        store.run(|connection| connection.pragma_update(None, "user_version", 99)).unwrap();
        let path = store.path().to_owned();
        drop(store);
        for error in [Store::open(&path).unwrap_err(), Store::open_to_read(&path).unwrap_err()] {
            assert!(matches!(error, Error::Newer { found: 99, .. }), "{error}");
            assert!(error.to_string().contains("newer"), "{error}");
        }
    }

    #[test]
    fn what_is_no_database_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ci.db");
        std::fs::write(&path, "not a database, but long enough to be looked at as one".repeat(20)).unwrap();
        assert!(matches!(Store::open(&path), Err(Error::Database { .. })));
        assert!(matches!(Store::open_to_read(&folder.path().join("none.db")), Err(Error::Database { .. })));
    }

    #[test]
    fn a_full_disk_loses_nothing_that_was_stored() {
        let (_folder, mut store) = new();
        store.set_fact("kept", "yes").unwrap();
        let pages: i64 =
            store.read(|connection| connection.pragma_query_value(None, "page_count", |row| row.get(0))).unwrap();
        store.run(|connection| connection.pragma_update(None, "max_page_count", pages + 2)).unwrap();
        let error = store.set_fact("large", &"x".repeat(1 << 20)).unwrap_err();
        assert!(error.to_string().contains("full"), "{error}");
        assert_eq!(store.fact("kept").unwrap().as_deref(), Some("yes"));
        assert_eq!(store.fact("large").unwrap(), None);
        store.run(|connection| connection.pragma_update(None, "max_page_count", 1 << 20)).unwrap();
        store.set_fact("after", "yes").unwrap();
    }
}
