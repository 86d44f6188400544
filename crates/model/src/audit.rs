//! The audit log: who did what, and what was refused. A host keeps it as a chain: each record carries the hash of the one
//! before it, so that none can be changed, left out or put in without all that follow being written anew.
//!
//! This is the form of records and the chain; where they are kept is the host's business.

use crate::{Error, Result};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// What is to be recorded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditEntry {
    /// Who writes: epoch of the executor and a number that grows within it. What is there already is not added again.
    pub origin: (u64, u64),
    /// When it happened.
    pub time: Timestamp,
    /// Who, in words (`certificate …`, `unix user 0`, `karst`).
    pub who: String,
    /// Where from: address, or empty.
    #[serde(default)]
    pub from: String,
    /// What: `request POST`, `instance-created`, `operation`.
    pub what: String,
    /// With what: a path of the API.
    pub object: String,
    /// Project, or empty.
    #[serde(default)]
    pub project: String,
    /// `done`, `refused`, `failed`, `accepted`.
    pub outcome: String,
    /// More, in words.
    #[serde(default)]
    pub detail: String,
}

/// An entry in its place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditRecord {
    /// Number, from 1.
    pub seq: u64,
    /// Hash of the record before it; of the first one 64 zeros.
    pub prev: String,
    /// The entry.
    pub entry: AuditEntry,
    /// SHA-256 over number, `prev` and entry, hex.
    pub hash: String,
}

/// The end of the chain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditHead {
    /// Number of the last record; 0 when there is none.
    pub seq: u64,
    /// Its hash.
    pub hash: String,
    /// Its origin.
    pub origin: (u64, u64),
}

impl Default for AuditHead {
    fn default() -> Self {
        Self { seq: 0, hash: "0".repeat(64), origin: (0, 0) }
    }
}

/// A part of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditRange {
    /// First number; those that are kept no longer are left out.
    pub from: u64,
    /// At most so many.
    pub limit: u32,
}

/// Is the chain whole?
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct AuditVerdict {
    /// Number of the oldest record that is kept.
    pub first: u64,
    /// The end of the chain as it was found.
    pub head: AuditHead,
    /// Records that were checked.
    pub checked: u64,
    /// What is wrong, in words; none when it is whole.
    pub fault: Option<String>,
}

fn digest(seq: u64, prev: &str, entry: &AuditEntry) -> Result<String> {
    let mut hash = Sha256::new();
    hash.update(seq.to_be_bytes());
    hash.update(prev.as_bytes());
    hash.update(serde_json::to_vec(entry)?);
    Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect())
}

impl AuditHead {
    /// The next record, when the entry is not there already; the head moves to it.
    ///
    /// # Errors
    /// Internal, when it cannot be encoded.
    pub fn link(&mut self, entry: AuditEntry) -> Result<Option<AuditRecord>> {
        if entry.origin <= self.origin {
            return Ok(None);
        }
        let seq = self.seq + 1;
        let hash = digest(seq, &self.hash, &entry)?;
        let prev = std::mem::replace(&mut self.hash, hash.clone());
        (self.seq, self.origin) = (seq, entry.origin);
        Ok(Some(AuditRecord { seq, prev, entry, hash }))
    }

    /// Follows the chain by one record.
    ///
    /// # Errors
    /// Conflict, in words, when the record does not belong here or was changed.
    pub fn follow(&mut self, record: &AuditRecord) -> Result<()> {
        let wrong = |why: &str| Err(Error::conflict(format!("record {}: {why}", record.seq)));
        if record.seq != self.seq + 1 {
            return wrong(&format!("it follows record {}: something is missing or was put in", self.seq));
        }
        if record.prev != self.hash {
            return wrong("it does not follow from the one before it");
        }
        if digest(record.seq, &record.prev, &record.entry)? != record.hash {
            return wrong("it was changed");
        }
        *self = Self { seq: record.seq, hash: record.hash.clone(), origin: record.entry.origin };
        Ok(())
    }

    /// The place before `record`, to begin with when what was before is kept no longer.
    pub fn before(record: &AuditRecord) -> Self {
        Self { seq: record.seq.saturating_sub(1), hash: record.prev.clone(), origin: (0, 0) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(n: u64) -> AuditEntry {
        AuditEntry {
            origin: (1, n),
            time: Timestamp::UNIX_EPOCH,
            who: "unix user 0".into(),
            from: String::new(),
            what: "instance-created".into(),
            object: format!("/1.0/instances/c{n}"),
            project: "default".into(),
            outcome: "done".into(),
            detail: String::new(),
        }
    }

    #[test]
    fn a_change_an_omission_and_an_insertion_are_found() {
        let mut head = AuditHead::default();
        let records: Vec<_> = (1..=5).map(|n| head.link(sample(n)).unwrap().unwrap()).collect();
        assert_eq!(head.link(sample(5)).unwrap(), None, "twice is once");
        let check = |records: &[AuditRecord]| -> Result<AuditHead> {
            let mut at = AuditHead::before(&records[0]);
            records.iter().try_for_each(|r| at.follow(r)).map(|()| at)
        };
        assert_eq!(check(&records).unwrap(), head);
        assert_eq!(check(&records[2..]).unwrap(), head, "what is kept no longer is not missed");
        let mut changed = records.clone();
        changed[2].entry.who = "somebody else".into();
        assert!(check(&changed).unwrap_err().message.contains("record 3: it was changed"));
        // With its own hash put right, the next one gives it away.
        changed[2].hash = digest(3, &changed[2].prev, &changed[2].entry).unwrap();
        assert!(check(&changed).unwrap_err().message.contains("record 4: it does not follow"));
        let mut short = records.clone();
        short.remove(2);
        assert!(check(&short).unwrap_err().message.contains("record 4: it follows record 2"));
        let mut long = records.clone();
        long.insert(2, records[1].clone());
        assert!(check(&long).is_err());
    }
}
