//! XDR (RFC 4506) as libvirt's protocol uses it: big-endian, everything a multiple of four bytes.
//!
//! What comes in is bounded by the frame it came in: a length beyond it is refused before anything is allocated.

use crate::error::VirError;
use uuid::Uuid;

/// Longest string of the protocol, bytes.
pub const STRING_MAX: usize = 4 << 20;

/// Reads values out of a payload.
#[derive(Debug)]
pub struct Reader<'a> {
    rest: &'a [u8],
}

/// A malformed payload.
fn malformed() -> VirError {
    VirError::rpc("Unable to decode message payload")
}

impl<'a> Reader<'a> {
    /// Over a payload.
    pub fn new(payload: &'a [u8]) -> Self {
        Self { rest: payload }
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8], VirError> {
        let (taken, rest) = self.rest.split_at_checked(n).ok_or_else(malformed)?;
        self.rest = rest;
        Ok(taken)
    }

    /// `unsigned int`.
    ///
    /// # Errors
    /// RPC, when the payload ends before.
    pub fn u32(&mut self) -> Result<u32, VirError> {
        let b = self.take(4)?;
        Ok(u32::from_be_bytes([b[0], b[1], b[2], b[3]]))
    }

    /// `int`.
    ///
    /// # Errors
    /// As [`Reader::u32`].
    pub fn i32(&mut self) -> Result<i32, VirError> {
        Ok(self.u32()? as i32)
    }

    /// `unsigned hyper`.
    ///
    /// # Errors
    /// As [`Reader::u32`].
    pub fn u64(&mut self) -> Result<u64, VirError> {
        Ok(u64::from(self.u32()?) << 32 | u64::from(self.u32()?))
    }

    /// `opaque x<max>`.
    ///
    /// # Errors
    /// RPC, when it is longer than `max` or than what is there.
    pub fn opaque(&mut self, max: usize) -> Result<&'a [u8], VirError> {
        let n = self.u32()? as usize;
        if n > max {
            return Err(malformed());
        }
        let bytes = self.take(n)?;
        self.take(n.next_multiple_of(4) - n)?;
        Ok(bytes)
    }

    /// A string that is there.
    ///
    /// # Errors
    /// RPC, when it is too long, or no UTF-8 text without NUL.
    pub fn string(&mut self) -> Result<String, VirError> {
        let bytes = self.opaque(STRING_MAX)?;
        let text = std::str::from_utf8(bytes).map_err(|_| malformed())?;
        if text.contains('\0') { Err(malformed()) } else { Ok(text.to_owned()) }
    }

    /// A value that may be absent.
    ///
    /// # Errors
    /// Those of `read`; RPC, when it is neither there nor absent.
    pub fn option<T>(
        &mut self,
        read: impl FnOnce(&mut Self) -> Result<T, VirError>,
    ) -> Result<Option<T>, VirError> {
        match self.u32()? {
            0 => Ok(None),
            1 => read(self).map(Some),
            _ => Err(malformed()),
        }
    }

    /// `x<max>` of values that take at least four bytes each.
    ///
    /// # Errors
    /// Those of `read`; RPC, when there are more than `max`.
    pub fn array<T>(
        &mut self,
        max: usize,
        mut read: impl FnMut(&mut Self) -> Result<T, VirError>,
    ) -> Result<Vec<T>, VirError> {
        let n = self.u32()? as usize;
        if n > max || n > self.rest.len() / 4 {
            return Err(malformed());
        }
        (0..n).map(|_| read(self)).collect()
    }

    /// Sixteen bytes.
    ///
    /// # Errors
    /// As [`Reader::u32`].
    pub fn uuid(&mut self) -> Result<Uuid, VirError> {
        Uuid::from_slice(self.take(16)?).map_err(|_| malformed())
    }

    /// Demands that nothing is left.
    ///
    /// # Errors
    /// RPC.
    pub fn end(&self) -> Result<(), VirError> {
        if self.rest.is_empty() { Ok(()) } else { Err(malformed()) }
    }
}

/// Writes values into a payload.
#[derive(Debug, Default)]
pub struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// What was written.
    pub fn finish(self) -> Vec<u8> {
        self.bytes
    }

    /// `unsigned int`; also `unsigned char`, `unsigned short` and `bool`, which take as much.
    pub fn u32(&mut self, v: u32) -> &mut Self {
        self.bytes.extend(v.to_be_bytes());
        self
    }

    /// `int`, `char`.
    pub fn i32(&mut self, v: i32) -> &mut Self {
        self.u32(v as u32)
    }

    /// `unsigned hyper`.
    pub fn u64(&mut self, v: u64) -> &mut Self {
        self.bytes.extend(v.to_be_bytes());
        self
    }

    /// `hyper`.
    pub fn i64(&mut self, v: i64) -> &mut Self {
        self.u64(v as u64)
    }

    /// `opaque x<>`.
    pub fn opaque(&mut self, bytes: &[u8]) -> &mut Self {
        self.u32(bytes.len() as u32);
        self.bytes.extend(bytes);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self
    }

    /// A string that is there.
    pub fn string(&mut self, s: &str) -> &mut Self {
        self.opaque(s.as_bytes())
    }

    /// A string that may be absent.
    pub fn optional(&mut self, s: Option<&str>) -> &mut Self {
        match s {
            None => self.u32(0),
            Some(s) => self.u32(1).string(s),
        }
    }

    /// Sixteen bytes.
    pub fn uuid(&mut self, uuid: Uuid) -> &mut Self {
        self.bytes.extend(uuid.as_bytes());
        self
    }

    /// `char x[N]`: each byte as an `int`, filled with NUL.
    pub fn characters(&mut self, s: &str, n: usize) -> &mut Self {
        let mut bytes = s.bytes().take(n.saturating_sub(1)).collect::<Vec<_>>();
        bytes.resize(n, 0);
        bytes.iter().for_each(|b| {
            self.u32(u32::from(*b));
        });
        self
    }

    /// `x<>`.
    pub fn array<T>(
        &mut self,
        all: impl IntoIterator<Item = T, IntoIter: ExactSizeIterator>,
        mut write: impl FnMut(&mut Self, T),
    ) -> &mut Self {
        let all = all.into_iter();
        self.u32(all.len() as u32);
        all.for_each(|v| write(self, v));
        self
    }
}

/// `remote_typed_param`: a named value of one of several types.
#[derive(Debug, Clone, PartialEq)]
pub enum Typed {
    /// `int`, type 1.
    Int(i32),
    /// `unsigned int`, type 2.
    Uint(u32),
    /// `long long`, type 3.
    Llong(i64),
    /// `unsigned long long`, type 4.
    Ullong(u64),
    /// `double`, type 5.
    Double(f64),
    /// `boolean`, type 6.
    Boolean(bool),
    /// `string`, type 7.
    Text(String),
}

impl Writer {
    /// A typed parameter.
    pub fn typed(&mut self, field: &str, value: &Typed) -> &mut Self {
        self.string(field);
        match value {
            Typed::Int(v) => self.u32(1).i32(*v),
            Typed::Uint(v) => self.u32(2).u32(*v),
            Typed::Llong(v) => self.u32(3).i64(*v),
            Typed::Ullong(v) => self.u32(4).u64(*v),
            Typed::Double(v) => self.u32(5).u64(v.to_bits()),
            Typed::Boolean(v) => self.u32(6).u32(u32::from(*v)),
            Typed::Text(v) => self.u32(7).string(v),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn values_have_the_protocols_shapes() {
        let mut w = Writer::new();
        w.string("abcde").optional(None).optional(Some("x")).characters("ab", 3).u64(1 << 32);
        let bytes = w.finish();
        assert_eq!(&bytes[..12], b"\0\0\0\x05abcde\0\0\0");
        assert_eq!(&bytes[12..16], [0; 4]);
        assert_eq!(&bytes[16..28], b"\0\0\0\x01\0\0\0\x01x\0\0\0");
        assert_eq!(&bytes[28..40], b"\0\0\0a\0\0\0b\0\0\0\0");
        assert_eq!(&bytes[40..], [0, 0, 0, 1, 0, 0, 0, 0]);
    }

    #[test]
    fn lengths_beyond_the_payload_are_refused() {
        let mut w = Writer::new();
        w.u32(u32::MAX);
        let bytes = w.finish();
        assert!(Reader::new(&bytes).string().is_err());
        assert!(Reader::new(&bytes).array(usize::MAX, Reader::u32).is_err());
        assert!(Reader::new(&bytes).option(|_| Ok(())).is_err());
        assert!(Reader::new(&bytes).uuid().is_err());
        assert!(Reader::new(&bytes).end().is_err());
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(s in ".{0,40}", n: u64, list in proptest::collection::vec(any::<u32>(), 0..20)) {
            let s = s.replace('\0', "");
            let mut w = Writer::new();
            w.string(&s).u64(n).optional(Some(&s)).array(&list, |w, v| { w.u32(*v); });
            let bytes = w.finish();
            let mut r = Reader::new(&bytes);
            prop_assert_eq!(r.string().unwrap(), s.clone());
            prop_assert_eq!(r.u64().unwrap(), n);
            prop_assert_eq!(r.option(|r| r.string()).unwrap(), Some(s));
            prop_assert_eq!(r.array(20, Reader::u32).unwrap(), list);
            prop_assert!(r.end().is_ok());
        }

        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut r = Reader::new(&bytes);
            let _ = r.string();
            let _ = r.option(|r| r.array(1000, |r| r.string()));
            let _ = r.opaque(64);
            let _ = r.uuid();
        }
    }
}
