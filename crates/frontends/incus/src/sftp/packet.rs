//! SFTP's packets: reading of requests, writing of answers.

use karst_model::{
    Error, ErrorKind,
    guest::{FileInfo, FileKind},
};

/// Status codes of the protocol.
pub mod status {
    /// Done.
    pub const OK: u32 = 0;
    /// End of file or directory.
    pub const EOF: u32 = 1;
    /// Missing.
    pub const NO_SUCH_FILE: u32 = 2;
    /// Not allowed.
    pub const PERMISSION_DENIED: u32 = 3;
    /// Anything else.
    pub const FAILURE: u32 = 4;
    /// Malformed.
    pub const BAD_MESSAGE: u32 = 5;
    /// Not known here.
    pub const OP_UNSUPPORTED: u32 = 8;
}

/// Request types.
pub mod request {
    #![allow(missing_docs)]
    pub const INIT: u8 = 1;
    pub const OPEN: u8 = 3;
    pub const CLOSE: u8 = 4;
    pub const READ: u8 = 5;
    pub const WRITE: u8 = 6;
    pub const LSTAT: u8 = 7;
    pub const FSTAT: u8 = 8;
    pub const SETSTAT: u8 = 9;
    pub const FSETSTAT: u8 = 10;
    pub const OPENDIR: u8 = 11;
    pub const READDIR: u8 = 12;
    pub const REMOVE: u8 = 13;
    pub const MKDIR: u8 = 14;
    pub const RMDIR: u8 = 15;
    pub const REALPATH: u8 = 16;
    pub const STAT: u8 = 17;
    pub const READLINK: u8 = 19;
    pub const SYMLINK: u8 = 20;
}

/// Answer types.
pub mod answer {
    #![allow(missing_docs)]
    pub const VERSION: u8 = 2;
    pub const STATUS: u8 = 101;
    pub const HANDLE: u8 = 102;
    pub const DATA: u8 = 103;
    pub const NAME: u8 = 104;
    pub const ATTRS: u8 = 105;
}

/// Flags of OPEN.
pub mod open {
    #![allow(missing_docs)]
    pub const WRITE: u32 = 2;
    pub const APPEND: u32 = 4;
    pub const CREAT: u32 = 8;
    pub const TRUNC: u32 = 16;
    pub const EXCL: u32 = 32;
}

const ATTR_SIZE: u32 = 1;
const ATTR_UIDGID: u32 = 2;
const ATTR_PERMISSIONS: u32 = 4;
const ATTR_TIMES: u32 = 8;

/// A malformed packet.
#[derive(Debug)]
pub struct Malformed;

/// Reads fields of a request.
#[derive(Debug)]
pub struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    fn bytes(&mut self, n: usize) -> Result<&'a [u8], Malformed> {
        if self.0.len() < n {
            return Err(Malformed);
        }
        let (head, rest) = self.0.split_at(n);
        self.0 = rest;
        Ok(head)
    }
    /// 32 bits.
    pub fn u32(&mut self) -> Result<u32, Malformed> {
        self.bytes(4)?.try_into().map(u32::from_be_bytes).map_err(|_| Malformed)
    }
    /// 64 bits.
    pub fn u64(&mut self) -> Result<u64, Malformed> {
        self.bytes(8)?.try_into().map(u64::from_be_bytes).map_err(|_| Malformed)
    }
    /// Bytes with their length.
    pub fn string(&mut self) -> Result<&'a [u8], Malformed> {
        let n = self.u32()? as usize;
        self.bytes(n)
    }
    /// A path.
    pub fn path(&mut self) -> Result<String, Malformed> {
        let s = std::str::from_utf8(self.string()?).map_err(|_| Malformed)?;
        if s.contains('\0') {
            return Err(Malformed);
        }
        Ok(s.to_owned())
    }
    /// Attributes.
    pub fn attributes(&mut self) -> Result<Attributes, Malformed> {
        let flags = self.u32()?;
        let mut a = Attributes::default();
        if flags & ATTR_SIZE != 0 {
            a.size = Some(self.u64()?);
        }
        if flags & ATTR_UIDGID != 0 {
            a.owner = Some((self.u32()?, self.u32()?));
        }
        if flags & ATTR_PERMISSIONS != 0 {
            a.mode = Some(self.u32()? & 0o7777);
        }
        if flags & ATTR_TIMES != 0 {
            a.times = Some((self.u32()?, self.u32()?));
        }
        Ok(a)
    }
}

/// Attributes in a request.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Attributes {
    /// Size.
    pub size: Option<u64>,
    /// User and group.
    pub owner: Option<(u32, u32)>,
    /// Permission bits.
    pub mode: Option<u32>,
    /// Accessed and modified.
    pub times: Option<(u32, u32)>,
}

/// An answer being written.
#[derive(Debug)]
pub struct Answer(Vec<u8>);

impl Answer {
    /// Begins one of `kind` to request `id`.
    pub fn new(kind: u8, id: u32) -> Self {
        let mut a = Self(vec![0, 0, 0, 0, kind]);
        a.u32(id);
        a
    }
    /// The first answer of a connection.
    pub fn version() -> Vec<u8> {
        let mut a = Self(vec![0, 0, 0, 0, answer::VERSION]);
        a.u32(3);
        a.finish()
    }
    /// 32 bits.
    pub fn u32(&mut self, n: u32) {
        self.0.extend_from_slice(&n.to_be_bytes());
    }
    fn u64(&mut self, n: u64) {
        self.0.extend_from_slice(&n.to_be_bytes());
    }
    /// Bytes with their length.
    pub fn string(&mut self, s: &[u8]) {
        self.u32(s.len() as u32);
        self.0.extend_from_slice(s);
    }
    /// Attributes of a file.
    pub fn attributes(&mut self, info: &FileInfo) {
        self.u32(ATTR_SIZE | ATTR_UIDGID | ATTR_PERMISSIONS | ATTR_TIMES);
        self.u64(info.size);
        self.u32(info.uid);
        self.u32(info.gid);
        self.u32(type_bits(info.kind) | (info.mode & 0o7777));
        let time = u32::try_from(info.modified).unwrap_or(0);
        self.u32(time);
        self.u32(time);
    }
    /// Its bytes.
    pub fn finish(mut self) -> Vec<u8> {
        let n = (self.0.len() - 4) as u32;
        self.0[..4].copy_from_slice(&n.to_be_bytes());
        self.0
    }
}

fn type_bits(kind: FileKind) -> u32 {
    match kind {
        FileKind::File => 0o100_000,
        FileKind::Directory => 0o040_000,
        FileKind::Symlink => 0o120_000,
    }
}

/// A status answer.
pub fn status(id: u32, code: u32, text: &str) -> Vec<u8> {
    let mut a = Answer::new(answer::STATUS, id);
    a.u32(code);
    a.string(text.as_bytes());
    a.string(b"en");
    a.finish()
}

/// The status of an error.
pub fn status_of(id: u32, e: &Error) -> Vec<u8> {
    let code = match e.kind {
        ErrorKind::NotFound => status::NO_SUCH_FILE,
        ErrorKind::Forbidden | ErrorKind::Unauthenticated => status::PERMISSION_DENIED,
        ErrorKind::Unsupported => status::OP_UNSUPPORTED,
        _ => status::FAILURE,
    };
    self::status(id, code, &e.to_string())
}
