//! What the calls carry that write memory of virtual machines into files of the host, and that look into such files. Paths are
//! those that an administrator says; the host's policy must grant them.

use crate::GuestRef;
use karst_model::{
    Error, InstanceId, MemoryJobId, Result,
    memory::{DumpFormat, MemoryEnd},
};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Bytes of a path at most.
pub const LONGEST_PATH: usize = 4000;

/// What is to be written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemoryWish {
    /// All of the machine's state, to go on from.
    Save {
        /// What describes the machine, for who reads the file; opaque to the host.
        document: String,
        /// It is to stand still when it goes on from there.
        paused: bool,
    },
    /// Its memory, to look into.
    Dump {
        /// In which form.
        format: DumpFormat,
    },
}

/// Memory to be written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineMemoryBegin {
    /// Of which machine.
    pub guest: GuestRef,
    /// What this is called.
    pub id: MemoryJobId,
    /// The file: absolute, without `..`.
    pub path: String,
    /// What.
    pub wish: MemoryWish,
}

/// Memory to be dumped into a file without a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineDump {
    /// Of which machine.
    pub guest: GuestRef,
    /// In which form.
    pub format: DumpFormat,
}

/// Memory that is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineMemoryRef {
    /// Whose.
    pub instance: InstanceId,
    /// Which; `None`: what a stop that keeps the memory writes.
    pub id: Option<MemoryJobId>,
}

/// Its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineMemoryEnd {
    /// Which.
    pub memory: MachineMemoryRef,
    /// How.
    pub end: MemoryEnd,
}

/// What a file with memory is to say of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryFileChange {
    /// The file.
    pub path: String,
    /// The machine whose memory it is; conflict when it is another's.
    pub uuid: Uuid,
    /// The new description.
    pub document: String,
    /// Is it to stand still when it goes on from there?
    pub paused: bool,
}

/// Demands a path that can be a file's.
///
/// # Errors
/// Invalid.
pub fn check_memory_path(path: &str) -> Result<()> {
    let parts = || path.split('/').skip(1);
    let good = path.starts_with('/')
        && path.len() <= LONGEST_PATH
        && !path.contains('\0')
        && parts().all(|p| !p.is_empty() && p != "." && p != ".." && p.len() <= 255);
    match good {
        true => Ok(()),
        false => Err(Error::invalid(
            "path",
            format!("{path:?} is not an absolute path of a file without \"..\" and empty parts"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths() {
        for good in ["/a", "/srv/saves/v 1.save"] {
            check_memory_path(good).unwrap();
        }
        for wrong in ["", "a", "/", "/a/", "//a", "/a/../b", "/./a", "/a\0"] {
            assert_eq!(check_memory_path(wrong).unwrap_err().field.as_deref(), Some("path"), "{wrong:?}");
        }
        assert!(check_memory_path(&format!("/{}", "x".repeat(256))).is_err());
    }
}
