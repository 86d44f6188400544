//! Memory of virtual machines in files of their host: how far its writing is, and what a file that a machine goes on from has in
//! front of the memory.
//!
//! Such a file begins with a block that says what it is and how large its two slots are, then the slots, then QEMU's migration
//! stream to the end of the file. Each slot has a number, the length of its content and a SHA-256 of all that; the content is a
//! [`SavedMemory`] as JSON. Of two that are whole the one with the higher number counts. So what a file says of itself is changed by
//! writing the other slot, and whoever is interrupted leaves the file as it was.
//!
//! Files are the bytes of strangers: every length is bounded before it is used, and what does not add up is refused with what is
//! wrong.

use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use uuid::Uuid;

/// What such a file begins with.
pub const MAGIC: [u8; 8] = *b"KARSTMEM";
/// Version of the form.
pub const VERSION: u32 = 1;
/// Bytes of the first block.
pub const BLOCK: usize = 4096;
/// Bytes of a slot at least and at most.
const SLOTS: std::ops::RangeInclusive<usize> = (64 << 10)..=(1 << 20);
/// Bytes of a slot before its content: number, length, SHA-256.
const HEAD: usize = 8 + 4 + 32;
/// Bytes of a document at most, and of what a driver says.
pub const DOCUMENT: usize = 128 << 10;

/// What is written of a machine that runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemoryKind {
    /// All of its state, to go on from; it stands still meanwhile, and ends.
    Save,
    /// Its memory alone, to look into; it stands still meanwhile, and goes on.
    Dump,
}

/// Form of memory to be looked into.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DumpFormat {
    /// ELF, all of it.
    Elf,
    /// That of kdump, compressed by zlib.
    KdumpZlib,
    /// The same by LZO.
    KdumpLzo,
    /// The same by snappy.
    KdumpSnappy,
    /// That of Windows, of guests that have QEMU's driver for it.
    WinDmp,
}

impl DumpFormat {
    /// All.
    pub const ALL: [Self; 5] = [Self::Elf, Self::KdumpZlib, Self::KdumpLzo, Self::KdumpSnappy, Self::WinDmp];

    /// Reads one.
    ///
    /// # Errors
    /// Invalid at `format`, naming those that there are.
    pub fn parse(text: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|f| f.as_str() == text).ok_or_else(|| {
            let all: Vec<&str> = Self::ALL.iter().map(|f| f.as_str()).collect();
            let text = format!("{text:?} is no form of dumped memory; {} are", all.join(", "));
            Error::invalid("format", text)
        })
    }

    /// In QEMU's and libvirt's words.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Elf => "elf",
            Self::KdumpZlib => "kdump-zlib",
            Self::KdumpLzo => "kdump-lzo",
            Self::KdumpSnappy => "kdump-snappy",
            Self::WinDmp => "win-dmp",
        }
    }
}

/// How far memory is written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct MemoryState {
    /// What becomes of it.
    pub phase: MemoryPhase,
    /// Bytes that are done of `total`.
    pub done: u64,
    /// Bytes that there are to do.
    pub total: u64,
}

/// What becomes of memory that is written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum MemoryPhase {
    /// None is written, or not any more: the machine ended before it was done.
    #[default]
    Gone,
    /// It is being written.
    Running,
    /// All of it is written.
    Done,
    /// It failed.
    Failed {
        /// Why, in words.
        reason: String,
    },
}

/// How the writing of memory ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemoryEnd {
    /// The file gets its name. What is saved stands still.
    Keep,
    /// There is no file, and a machine that ran goes on.
    Cancel,
}

/// What a file with a machine's memory says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedMemory {
    /// UUID that the machine's firmware shows.
    pub uuid: Uuid,
    /// Its machine type.
    pub machine: String,
    /// Its description, in words of who had it saved.
    pub document: String,
    /// What a driver wants to find again, in its own words.
    pub shape: String,
    /// It is to stand still when it goes on from there.
    pub paused: bool,
    /// Bytes of memory behind this; unknown until all is written.
    #[serde(default)]
    pub stream: Option<u64>,
}

impl SavedMemory {
    /// Demands that it can be written.
    ///
    /// # Errors
    /// Too large, by field.
    pub fn check(&self) -> Result<()> {
        for (field, text) in
            [("document", &self.document), ("shape", &self.shape), ("machine", &self.machine)]
        {
            if text.len() > DOCUMENT {
                let text = format!("the description of the machine is larger than {DOCUMENT} bytes");
                return Err(Error::too_large(text).at(field));
            }
        }
        Ok(())
    }
}

/// Where things are in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    slot: usize,
}

fn damaged(what: &str) -> Error {
    Error::invalid("path", format!("the file is no memory of a virtual machine that can be used: {what}"))
}

impl Layout {
    /// Of a new file: with room for a description twice as long.
    ///
    /// # Errors
    /// Too large.
    pub fn of(saved: &SavedMemory) -> Result<Self> {
        saved.check()?;
        let content = serde_json::to_vec(saved)?.len() + HEAD;
        let slot = (content * 2).clamp(*SLOTS.start(), *SLOTS.end()).next_multiple_of(BLOCK);
        match content <= slot {
            true => Ok(Self { slot }),
            false => Err(Error::too_large("the description of the machine is too large").at("document")),
        }
    }

    /// Reads the first block.
    ///
    /// # Errors
    /// Invalid: it is something else, or of a version that is not known.
    pub fn read(block: &[u8]) -> Result<Self> {
        let number = |at: usize| {
            let bytes = block.get(at..at + 4).and_then(|b| b.try_into().ok());
            bytes.map(u32::from_le_bytes).ok_or_else(|| damaged("it is too short"))
        };
        if block.get(..8) != Some(&MAGIC[..]) {
            return Err(damaged("it does not begin as one"));
        }
        let version = number(8)?;
        if version != VERSION {
            return Err(damaged(&format!("it is of version {version}, and this host knows {VERSION}")));
        }
        let slot = number(12)? as usize;
        if !SLOTS.contains(&slot) || !slot.is_multiple_of(BLOCK) {
            return Err(damaged("its slots have no size that there is"));
        }
        Ok(Self { slot })
    }

    /// The first block.
    pub fn block(self) -> Vec<u8> {
        let mut block = vec![0; BLOCK];
        block[..8].copy_from_slice(&MAGIC);
        block[8..12].copy_from_slice(&VERSION.to_le_bytes());
        block[12..16].copy_from_slice(&(self.slot as u32).to_le_bytes());
        block
    }

    /// Bytes before the memory.
    pub fn head(self) -> usize {
        BLOCK + 2 * self.slot
    }

    /// Where a slot begins, by its number.
    pub fn slot_at(self, number: u64) -> usize {
        BLOCK + usize::from(number % 2 == 1) * self.slot
    }

    /// What a slot gets.
    ///
    /// # Errors
    /// Too large for the file.
    pub fn slot(self, number: u64, saved: &SavedMemory) -> Result<Vec<u8>> {
        saved.check()?;
        let content = serde_json::to_vec(saved)?;
        if content.len() + HEAD > self.slot {
            return Err(Error::too_large(
                "the description is too large for the room that the file has for it",
            )
            .at("document"));
        }
        let length = (content.len() as u32).to_le_bytes();
        let mut slot = number.to_le_bytes().to_vec();
        slot.extend(length);
        slot.extend(digest(self, number, &content));
        slot.extend(content);
        Ok(slot)
    }

    /// What all that is before the memory says: the number that counts, and its content.
    ///
    /// # Errors
    /// Invalid when neither slot is whole.
    pub fn saved(self, head: &[u8]) -> Result<(u64, SavedMemory)> {
        let slots = [0, 1].map(|n| head.get(self.slot_at(n)..self.slot_at(n) + self.slot));
        let whole =
            slots.into_iter().flatten().enumerate().filter_map(|(n, slot)| self.whole(n as u64, slot));
        let (number, content) =
            whole.max_by_key(|(number, _)| *number).ok_or_else(|| damaged("its description is damaged"))?;
        let saved: SavedMemory =
            serde_json::from_slice(content).map_err(|_| damaged("its description is not understood"))?;
        saved.check().map_err(|_| damaged("its description is too large"))?;
        Ok((number, saved))
    }

    fn whole(self, place: u64, slot: &[u8]) -> Option<(u64, &[u8])> {
        let number = u64::from_le_bytes(slot.get(..8)?.try_into().ok()?);
        let length = u32::from_le_bytes(slot.get(8..12)?.try_into().ok()?) as usize;
        let content = slot.get(HEAD..HEAD.checked_add(length)?)?;
        let good = number > 0 && number % 2 == place && digest(self, number, content) == slot[12..HEAD];
        good.then_some((number, content))
    }
}

fn digest(layout: Layout, number: u64, content: &[u8]) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(&layout.block()[..16]);
    hash.update(number.to_le_bytes());
    hash.update((content.len() as u64).to_le_bytes());
    hash.update(content);
    hash.finalize().into()
}

/// All that is before the memory of a new file.
///
/// # Errors
/// Too large.
pub fn new_head(saved: &SavedMemory) -> Result<Vec<u8>> {
    let layout = Layout::of(saved)?;
    let mut head = layout.block();
    head.resize(layout.head(), 0);
    let slot = layout.slot(1, saved)?;
    let at = layout.slot_at(1);
    head[at..at + slot.len()].copy_from_slice(&slot);
    Ok(head)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn saved(document: &str) -> SavedMemory {
        SavedMemory {
            uuid: Uuid::from_u128(7),
            machine: "pc-q35-7.2".into(),
            document: document.into(),
            shape: "{}".into(),
            paused: false,
            stream: None,
        }
    }

    fn read(head: &[u8]) -> Result<(u64, SavedMemory)> {
        Layout::read(head)?.saved(head)
    }

    #[test]
    fn a_change_that_is_torn_leaves_what_was() {
        let old = saved("<domain/>");
        let mut head = new_head(&old).unwrap();
        let layout = Layout::read(&head).unwrap();
        assert_eq!(read(&head).unwrap(), (1, old.clone()));
        let new = SavedMemory { stream: Some(9), ..saved("<domain type='kvm'/>") };
        let slot = layout.slot(2, &new).unwrap();
        let at = layout.slot_at(2);
        for n in 0..slot.len() {
            head[at + n] = slot[n];
            let found = read(&head).unwrap();
            let torn = if n + 1 < slot.len() { (1, old.clone()) } else { (2, new.clone()) };
            assert_eq!(found, torn, "{n}");
        }
        // A slot in the other's place counts for nothing.
        let mut moved = new_head(&old).unwrap();
        let other = layout.slot_at(1);
        moved[other..other + slot.len()].copy_from_slice(&slot);
        assert!(read(&moved).is_err());
    }

    #[test]
    fn what_is_something_else_is_named() {
        let head = new_head(&saved("<domain/>")).unwrap();
        let with = |at: usize, byte: u8| {
            let mut head = head.clone();
            head[at] = byte;
            read(&head).unwrap_err().message
        };
        assert!(with(0, b'X').contains("does not begin"));
        assert!(with(8, 9).contains("version 9"));
        assert!(with(12, 1).contains("size"));
        assert!(with(15, 0xff).contains("size"));
        let layout = Layout::read(&head).unwrap();
        assert!(with(layout.slot_at(1) + HEAD, b'x').contains("damaged"));
        assert!(with(layout.slot_at(1) + 11, 0xff).contains("damaged"), "a length without end");
        assert!(read(b"").is_err() && read(&head[..BLOCK]).is_err());
        let large = saved(&"x".repeat(DOCUMENT + 1));
        assert_eq!(new_head(&large).unwrap_err().field.as_deref(), Some("document"));
        // The largest that may be, as JSON twice as long, has its place.
        read(&new_head(&saved(&"\"".repeat(DOCUMENT))).unwrap()).unwrap();
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(document in ".{0,2000}", shape in ".{0,200}", paused: bool, stream: Option<u64>) {
            let all = SavedMemory { shape, paused, stream, ..saved(&document) };
            prop_assert_eq!(read(&new_head(&all).unwrap()).unwrap(), (1, all));
        }

        #[test]
        fn strangers_bytes_are_refused_or_understood(
            at in 0usize..140_000, byte: u8, cut in 0usize..140_000, junk in proptest::collection::vec(any::<u8>(), 0..5000),
        ) {
            let mut head = new_head(&saved("<domain/>")).unwrap();
            let n = at % head.len();
            head[n] = byte;
            head.truncate(cut);
            if let Ok((_, found)) = read(&head) {
                prop_assert_eq!(found, saved("<domain/>"));
            }
            let _ = read(&junk);
            let mut begun = Layout::of(&saved("x")).unwrap().block();
            begun.extend(junk);
            prop_assert!(read(&begun).is_err());
        }
    }
}
