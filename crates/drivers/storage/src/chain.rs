//! Layers of disks in pools of directories: a state has `disk.img`, the file that its disk was made with, and `layer-N.img` for each layer
//! that was put over it. Which of them there are, lowest first, its record says ([`Record::chain`]); what a qcow2 file itself names as
//! what lies below it counts nowhere.
//!
//! The record names a layer before anything is written to it, and a file that goes is named by no record any more: so whatever a crash
//! leaves is a whole chain, and files beside it that nobody has, which go with the next change.

use crate::{
    ChainFile, DiskLayers, FileChain, FilePool, Format,
    files::blocking,
    states::{self, Record},
};
use async_trait::async_trait;
use karst_host::{Program, run};
use karst_model::{Error, Result, VolumeId, layer::MOST};
use std::{
    io,
    path::{Path, PathBuf},
};

/// Name of a file of a disk.
pub(crate) fn file(number: u32) -> String {
    match number {
        0 => "disk.img".to_owned(),
        n => format!("layer-{n}.img"),
    }
}

/// The number that a file's name says.
fn number(name: &str) -> Option<u32> {
    match name {
        "disk.img" => Some(0),
        _ => name.strip_prefix("layer-")?.strip_suffix(".img")?.parse().ok().filter(|n| *n > 0),
    }
}

impl Record {
    /// The files of its disk, lowest first.
    pub(crate) fn numbers(&self) -> Vec<u32> {
        if self.chain.is_empty() { vec![0] } else { self.chain.clone() }
    }

    /// The file that is written.
    pub(crate) fn active(&self) -> u32 {
        self.chain.last().copied().unwrap_or(0)
    }

    /// The name of that.
    pub(crate) fn disk(&self) -> String {
        file(self.active())
    }

    /// Form of one of its files.
    fn form(&self, number: u32) -> Format {
        if number == 0 { self.format } else { Format::Qcow2 }
    }

    /// Form of the one that is written.
    pub(crate) fn active_format(&self) -> Format {
        if self.content.is_disk() { self.form(self.active()) } else { self.format }
    }

    /// Its disk as one file, for a state that has nothing else.
    pub(crate) fn as_one(&self) -> Self {
        Self { chain: vec![], format: self.active_format(), ..self.clone() }
    }

    /// Where they are.
    pub(crate) fn located(&self, state: &Path) -> FileChain {
        let numbers = self.numbers();
        let lower = |n: &u32| ChainFile { number: *n, path: state.join(file(*n)), format: self.form(*n) };
        FileChain { number: self.active(), below: numbers.iter().rev().skip(1).map(lower).collect() }
    }

    /// Refuses what is not done to a disk in layers.
    pub(crate) fn demand_one(&self) -> Result<()> {
        if self.chain.len() < 2 {
            return Ok(());
        }
        Err(Error::conflict(
            "the disk has layers, and this is done to a disk that is one file; merge them first, while its virtual machine \
             runs: `karst disk pull` (virsh blockpull) or `karst disk commit` (virsh blockcommit)",
        ))
    }
}

/// Removes files of the disk that its record does not name.
fn sweep(state: &Path, record: &Record) -> Result<()> {
    let named = record.numbers();
    for entry in std::fs::read_dir(state)?.flatten() {
        let number = entry.file_name().to_str().and_then(number);
        if number.is_some_and(|n| !named.contains(&n)) {
            remove(&entry.path())?;
        }
    }
    if !record.based {
        remove(&state.join("base.img"))?;
    }
    Ok(())
}

fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e.into()),
        _ => Ok(()),
    }
}

/// An empty qcow2 file, which names nothing below it.
async fn blank(path: &Path, size: u64) -> Result<()> {
    let made = run(Program::QemuImg)
        .args(["create", "-q", "-f", "qcow2"])
        .arg(path)
        .arg(size.to_string())
        .ok()
        .await;
    made.map_err(crate::files::full)?;
    states::set_mode(path, 0o600)
}

impl FilePool {
    async fn disk_state(&self, volume: VolumeId) -> Result<(PathBuf, Record)> {
        let record = self.known(volume, None).await?;
        if !record.content.is_disk() {
            return Err(Error::unsupported("a file system has no layers of this kind; disks have"));
        }
        Ok((self.dir(volume), record))
    }
}

#[async_trait]
impl DiskLayers for FilePool {
    async fn chain(&self, volume: VolumeId) -> Result<Vec<u32>> {
        Ok(self.disk_state(volume).await?.1.numbers())
    }

    async fn has_base(&self, volume: VolumeId) -> Result<bool> {
        Ok(self.disk_state(volume).await?.1.based)
    }

    async fn add(&self, volume: VolumeId, number: u32) -> Result<()> {
        let (state, mut record) = self.disk_state(volume).await?;
        let mut numbers = record.numbers();
        if numbers.contains(&number) {
            return Ok(());
        }
        if numbers.last().is_some_and(|last| number <= *last) {
            return Err(Error::invalid("number", "a layer has a higher number than all before it"));
        }
        if numbers.len() > MOST {
            return Err(Error::conflict(format!("a disk has at most {MOST} layers")));
        }
        let size = record.size.ok_or_else(|| Error::internal("the size of the disk is not known", volume))?;
        // What an earlier try has left is of no use, and would be taken for what was written.
        let (at, swept) = (state.clone(), record.clone());
        blocking(move || sweep(&at, &swept)).await?;
        blank(&state.join(file(number)), size.0).await?;
        numbers.push(number);
        record.chain = numbers;
        blocking(move || {
            std::fs::File::open(state.join(file(number)))?.sync_all()?;
            record.write(&state)?;
            Ok(std::fs::File::open(&state)?.sync_all()?)
        })
        .await
    }

    async fn take_back(&self, volume: VolumeId, number: u32) -> Result<()> {
        let (state, mut record) = self.disk_state(volume).await?;
        if number == 0 || !record.chain.contains(&number) {
            return Ok(());
        }
        if record.active() != number {
            return Err(Error::conflict("a layer lies over this one"));
        }
        record.chain.pop();
        blocking(move || settle(&state, record)).await
    }

    async fn keep(&self, volume: VolumeId, left: &[u32]) -> Result<()> {
        let (state, mut record) = self.disk_state(volume).await?;
        let before = record.numbers();
        let numbers: Vec<u32> = before.iter().copied().filter(|n| left.contains(n)).collect();
        if numbers.is_empty() {
            return Err(Error::invalid("left", "nothing of the disk would be left"));
        }
        // An image lies below the file that the disk was made with, and below nothing else.
        if numbers.first() != before.first() {
            record.based = false;
        }
        record.chain = numbers;
        blocking(move || settle(&state, record)).await
    }

    async fn leave_base(&self, volume: VolumeId) -> Result<()> {
        let (state, mut record) = self.disk_state(volume).await?;
        record.based = false;
        blocking(move || settle(&state, record)).await
    }
}

/// Writes what is so, then lets go what is not named any more.
fn settle(state: &Path, mut record: Record) -> Result<()> {
    // Names of files of a disk that is the one that it was made with are as they always were.
    if record.chain == [0] {
        record.chain.clear();
    }
    record.write(state)?;
    std::fs::File::open(state)?.sync_all()?;
    sweep(state, &record)
}

#[cfg(test)]
mod tests {
    use super::*;
    use karst_model::{ByteSize, storage::VolumeContent};

    fn record(chain: &[u32], format: Format, based: bool) -> Record {
        Record {
            content: VolumeContent::Block,
            format,
            size: Some(ByteSize(1 << 20)),
            based,
            image: None,
            moved: None,
            chain: chain.to_vec(),
        }
    }

    #[test]
    fn files_are_named_by_numbers_and_nothing_else_is_a_layer() {
        for n in [0, 1, 77] {
            assert_eq!(number(&file(n)), Some(n));
        }
        for name in ["base.img", "layer-0.img", "layer-.img", "layer-1", "volume.json", "layer-x.img"] {
            assert_eq!(number(name), None, "{name}");
        }
    }

    #[test]
    fn the_highest_is_written_and_the_others_lie_below_it() {
        let one = record(&[], Format::Raw, false);
        assert_eq!((one.disk().as_str(), one.active_format()), ("disk.img", Format::Raw));
        assert_eq!(one.located(Path::new("/s")), FileChain::default());
        one.demand_one().unwrap();
        let three = record(&[0, 2, 5], Format::Raw, false);
        assert_eq!((three.disk().as_str(), three.active_format()), ("layer-5.img", Format::Qcow2));
        let located = three.located(Path::new("/s"));
        let below: Vec<_> =
            located.below.iter().map(|f| (f.number, f.path.to_str().unwrap(), f.format)).collect();
        assert_eq!(located.number, 5);
        assert_eq!(below, [(2, "/s/layer-2.img", Format::Qcow2), (0, "/s/disk.img", Format::Raw)]);
        assert!(three.demand_one().unwrap_err().message.contains("blockcommit"));
        let pulled = record(&[5], Format::Raw, false);
        assert_eq!((pulled.disk().as_str(), pulled.active_format()), ("layer-5.img", Format::Qcow2));
        pulled.demand_one().unwrap();
        let copy = pulled.as_one();
        assert_eq!((copy.disk().as_str(), copy.format), ("disk.img", Format::Qcow2));
    }

    #[test]
    fn what_no_record_names_goes_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path();
        let there = || {
            let mut names: Vec<String> = std::fs::read_dir(state)
                .unwrap()
                .map(|e| e.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            names
        };
        for name in ["disk.img", "base.img", "layer-1.img", "layer-2.img", "layer-3.img", "other"] {
            std::fs::write(state.join(name), "").unwrap();
        }
        settle(state, record(&[0, 2], Format::Qcow2, true)).unwrap();
        assert_eq!(there(), ["base.img", "disk.img", "layer-2.img", "other", "volume.json"]);
        settle(state, record(&[2], Format::Qcow2, false)).unwrap();
        assert_eq!(there(), ["layer-2.img", "other", "volume.json"]);
        assert_eq!(Record::read(state).unwrap().unwrap().chain, [2]);
        std::fs::write(state.join("disk.img"), "").unwrap();
        settle(state, record(&[0], Format::Qcow2, false)).unwrap();
        let now = Record::read(state).unwrap().unwrap();
        assert_eq!(
            (now.chain.as_slice(), there()),
            (&[][..], vec!["disk.img".into(), "other".into(), "volume.json".into()])
        );
    }
}
