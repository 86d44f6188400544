//! The audit log of this host: segments of bounded size and number under `DIR/host/audit`, root's alone.
//!
//! ```text
//! audit/00000000000000000001.jsonl   0600  records from this number on, one JSON object a line
//! ```
//! Records are written before the call is answered and are with the kernel then: they survive the end of every daemon.
//! Against a power cut they are synced when a segment is full and at the latest every few seconds by the kernel's own
//! write-back. A line that a power cut left half is cut off at the next start, which the log says of itself.

use karst_model::{
    Error, Result,
    audit::{AuditEntry, AuditHead, AuditRange, AuditRecord, AuditVerdict},
};
use std::{
    fs::{self, File, OpenOptions},
    io::{BufRead, BufReader, Seek, SeekFrom, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

/// Bytes of a segment, and how many of them are kept: at most 128 MiB in all.
const SEGMENT: u64 = 8 << 20;
const KEPT: usize = 16;
/// Most records of one answer.
const PAGE: u32 = 1000;

/// The log, open for appending.
#[derive(Debug)]
pub(crate) struct AuditLog {
    directory: PathBuf,
    segment: u64,
    head: AuditHead,
    file: Option<(File, u64)>,
}

fn failed(e: std::io::Error) -> Error {
    Error::from(e).with_context("audit log")
}

/// Segments by their first number, oldest first.
fn segments(directory: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut found = vec![];
    for entry in fs::read_dir(directory).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let first =
            path.file_name().and_then(|n| n.to_str()).and_then(|n| n.strip_suffix(".jsonl")?.parse().ok());
        found.extend(first.map(|first| (first, path)));
    }
    found.sort();
    Ok(found)
}

/// Calls `each` with every line of a segment and where it ends; the last one may be cut.
fn lines(path: &Path, mut each: impl FnMut(&[u8], u64) -> Result<bool>) -> Result<()> {
    let mut reader = BufReader::new(File::open(path).map_err(failed)?);
    let (mut line, mut at) = (vec![], 0);
    loop {
        line.clear();
        let n = reader.read_until(b'\n', &mut line).map_err(failed)?;
        at += n as u64;
        if n == 0 || !each(&line, at)? {
            return Ok(());
        }
    }
}

fn parse(line: &[u8]) -> Option<AuditRecord> {
    line.ends_with(b"\n").then(|| serde_json::from_slice(line).ok()).flatten()
}

impl AuditLog {
    /// Opens the log; a line at its end that was not written whole is cut off.
    pub fn open(directory: PathBuf) -> Result<Self> {
        Self::with(directory, SEGMENT)
    }

    fn with(directory: PathBuf, segment: u64) -> Result<Self> {
        match fs::DirBuilder::new().mode(0o700).create(&directory) {
            Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => return Err(failed(e)),
            _ => {}
        }
        let mut log = Self { directory, segment, head: AuditHead::default(), file: None };
        if let Some((_, path)) = segments(&log.directory)?.pop() {
            let mut last: Option<AuditRecord> = None;
            let mut whole = 0;
            lines(&path, |line, end| {
                // What is damaged in the middle is for `verify` to find, not for a start to cut away.
                if let Some(record) = parse(line) {
                    (last, whole) = (Some(record), end);
                } else if line.ends_with(b"\n") {
                    whole = end;
                }
                Ok(true)
            })?;
            let file = OpenOptions::new().append(true).open(&path).map_err(failed)?;
            file.set_len(whole).map_err(failed)?;
            log.file = Some((file, whole));
            match last {
                Some(r) => log.head = AuditHead { seq: r.seq, hash: r.hash, origin: r.entry.origin },
                // An empty segment: its name says what comes, and the one before how it goes on.
                None => log.head = log.walk()?.head,
            }
        }
        Ok(log)
    }

    /// Adds entries in order; answers the end of the chain.
    pub fn append(&mut self, entries: Vec<AuditEntry>) -> Result<AuditHead> {
        let mut head = self.head.clone();
        let mut text = vec![];
        let mut first = None;
        for entry in entries {
            if let Some(record) = head.link(entry)? {
                first.get_or_insert(record.seq);
                serde_json::to_writer(&mut text, &record)?;
                text.push(b'\n');
            }
        }
        let Some(first) = first else { return Ok(head) };
        if self.file.as_ref().is_none_or(|(_, size)| *size >= self.segment) {
            self.turn(first)?;
        }
        let Some((file, size)) = &mut self.file else {
            return Err(Error::internal("the audit log is not open", first));
        };
        if let Err(e) = file.write_all(&text) {
            // Nothing half stays: the next attempt writes the whole again.
            file.set_len(*size).map_err(failed)?;
            return Err(failed(e));
        }
        *size += text.len() as u64;
        self.head = head.clone();
        Ok(head)
    }

    /// Begins a segment and lets go of the oldest.
    fn turn(&mut self, first: u64) -> Result<()> {
        if let Some((full, _)) = &self.file {
            full.sync_all().map_err(failed)?;
        }
        let path = self.directory.join(format!("{first:020}.jsonl"));
        let file = OpenOptions::new().append(true).create(true).mode(0o600).open(&path).map_err(failed)?;
        File::open(&self.directory).and_then(|d| d.sync_all()).map_err(failed)?;
        self.file = Some((file, 0));
        let all = segments(&self.directory)?;
        for (_, old) in all.iter().take(all.len().saturating_sub(KEPT)) {
            fs::remove_file(old).map_err(failed)?;
        }
        Ok(())
    }

    /// A page of records.
    pub fn read(&self, range: AuditRange) -> Result<Vec<AuditRecord>> {
        let limit = range.limit.min(PAGE) as usize;
        let all = segments(&self.directory)?;
        // The segment that holds the first, and those behind it.
        let begin = all.iter().rposition(|(first, _)| *first <= range.from).unwrap_or(0);
        let mut page = vec![];
        for (_, path) in &all[begin.min(all.len())..] {
            lines(path, |line, _| {
                page.extend(parse(line).filter(|r| r.seq >= range.from));
                Ok(page.len() < limit)
            })?;
            if page.len() >= limit {
                break;
            }
        }
        Ok(page)
    }

    /// Checks the chain as far as it is kept, from the files alone.
    pub fn verify(&self) -> Result<AuditVerdict> {
        let mut verdict = self.walk()?;
        if verdict.fault.is_none() && verdict.head.seq != self.head.seq {
            verdict.fault = Some(format!(
                "the log ends with record {}, but {} were written: its end was cut off",
                verdict.head.seq, self.head.seq
            ));
        }
        Ok(verdict)
    }

    fn walk(&self) -> Result<AuditVerdict> {
        let mut verdict = AuditVerdict::default();
        for (_, path) in segments(&self.directory)? {
            lines(&path, |line, _| {
                let Some(record) = parse(line) else {
                    verdict.fault = Some(format!("what follows record {} cannot be read", verdict.head.seq));
                    return Ok(false);
                };
                if verdict.checked == 0 {
                    verdict.first = record.seq;
                    verdict.head = AuditHead::before(&record);
                }
                match verdict.head.follow(&record) {
                    Ok(()) => verdict.checked += 1,
                    Err(e) => verdict.fault = Some(e.message),
                }
                Ok(verdict.fault.is_none())
            })?;
            if verdict.fault.is_some() {
                break;
            }
        }
        Ok(verdict)
    }

    /// Puts what was written on the disk.
    pub fn sync(&mut self) -> Result<()> {
        match &mut self.file {
            Some((file, _)) => {
                file.seek(SeekFrom::End(0)).map_err(failed)?;
                file.sync_data().map_err(failed)
            }
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(n: u64) -> AuditEntry {
        AuditEntry {
            origin: (1, n),
            time: "2026-01-02T03:04:05Z".parse().unwrap(),
            who: "unix user 0".into(),
            from: String::new(),
            what: "instance-created".into(),
            object: format!("/1.0/instances/c{n}"),
            project: "default".into(),
            outcome: "done".into(),
            detail: String::new(),
        }
    }

    fn fill(log: &mut AuditLog, from: u64, to: u64) {
        for n in from..=to {
            log.append(vec![sample(n)]).unwrap();
        }
    }

    #[test]
    fn it_goes_on_where_it_was_and_stays_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit");
        let mut log = AuditLog::with(path.clone(), 1000).unwrap();
        fill(&mut log, 1, 20);
        assert_eq!(log.append(vec![sample(20), sample(21)]).unwrap().seq, 21, "twice is once");
        drop(log);
        // A crash in the middle of a line.
        let last = segments(&path).unwrap().pop().unwrap().1;
        OpenOptions::new().append(true).open(&last).unwrap().write_all(b"{\"seq\":22,\"pre").unwrap();
        let mut log = AuditLog::with(path.clone(), 1000).unwrap();
        fill(&mut log, 22, 200);
        log.sync().unwrap();
        let verdict = log.verify().unwrap();
        assert_eq!((verdict.fault.clone(), verdict.head.seq), (None, 200));
        assert!(verdict.first > 1 && segments(&path).unwrap().len() <= KEPT, "{verdict:?}");
        assert_eq!(verdict.checked, 200 - verdict.first + 1);
        let page = log.read(AuditRange { from: 180, limit: 5 }).unwrap();
        assert_eq!(page.iter().map(|r| r.seq).collect::<Vec<_>>(), [180, 181, 182, 183, 184]);
        assert_eq!(log.read(AuditRange { from: 1, limit: 1 }).unwrap()[0].seq, verdict.first);
        assert!(log.read(AuditRange { from: 201, limit: 5 }).unwrap().is_empty());
    }

    #[test]
    fn what_was_tampered_with_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let fresh = |name: &str| {
            let mut log = AuditLog::with(dir.path().join(name), 1 << 20).unwrap();
            fill(&mut log, 1, 10);
            let file = segments(&log.directory).unwrap().pop().unwrap().1;
            (log, file)
        };
        let edit = |file: &Path, change: &dyn Fn(Vec<&str>) -> Vec<String>| {
            let text = fs::read_to_string(file).unwrap();
            let lines = change(text.lines().collect());
            fs::write(file, lines.iter().map(|l| format!("{l}\n")).collect::<String>()).unwrap();
        };
        let owned = |l: Vec<&str>| l.into_iter().map(str::to_owned).collect::<Vec<_>>();
        let (log, file) = fresh("changed");
        edit(&file, &|l| {
            owned(l).into_iter().map(|l| l.replace("/instances/c4\"", "/instances/c5\"")).collect()
        });
        assert!(log.verify().unwrap().fault.unwrap().contains("record 4: it was changed"));
        let (log, file) = fresh("removed");
        edit(&file, &|mut l| {
            l.remove(6);
            owned(l)
        });
        assert!(log.verify().unwrap().fault.unwrap().contains("record 8"));
        let (log, file) = fresh("cut");
        edit(&file, &|mut l| {
            l.truncate(8);
            owned(l)
        });
        assert!(log.verify().unwrap().fault.unwrap().contains("cut off"));
        let (log, file) = fresh("garbage");
        edit(&file, &|mut l| {
            l[3] = "{}";
            owned(l)
        });
        assert!(log.verify().unwrap().fault.unwrap().contains("record 3 cannot be read"));
    }
}
