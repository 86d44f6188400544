//! The bytes of an archive: taken out of their compression, counted on both sides of it, and the end remembered.

use karst_model::{Error, Result};
use std::{
    cell::Cell,
    io::{self, Read},
    rc::Rc,
};

/// Counts what comes through and remembers the last 512 bytes.
pub(super) struct Tail<R> {
    pub(super) inner: R,
    pub(super) last: [u8; 512],
    pub(super) total: u64,
    pub(super) consumed: Rc<Cell<u64>>,
    pub(super) ratio: u64,
}

/// Counts the bytes of the archive itself.
pub(super) struct Counted<R> {
    pub(super) inner: R,
    pub(super) consumed: Rc<Cell<u64>>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.consumed.set(self.consumed.get() + n as u64);
        Ok(n)
    }
}

impl<R: Read> Read for Tail<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.total += n as u64;
        if self.total > 256 << 20 && self.total / self.ratio > self.consumed.get() {
            return Err(io::Error::other("the data unpacks to implausibly much"));
        }
        if n >= 512 {
            self.last.copy_from_slice(&buffer[n - 512..n]);
        } else if n > 0 {
            self.last.copy_within(n.., 0);
            self.last[512 - n..].copy_from_slice(&buffer[..n]);
        }
        Ok(n)
    }
}

/// Of the compression that the first bytes tell, or as they are.
pub(crate) fn decompress<'a>(mut input: impl Read + 'a, field: &str) -> Result<Box<dyn Read + 'a>> {
    let mut magic = Vec::new();
    input.by_ref().take(6).read_to_end(&mut magic)?;
    let whole = io::BufReader::with_capacity(256 << 10, io::Cursor::new(magic.clone()).chain(input));
    let unreadable = |e: io::Error| Error::invalid(field, "the compressed data is corrupt").with_context(e);
    Ok(match magic.as_slice() {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(whole)),
        [0xfd, b'7', b'z', b'X', b'Z', 0] => {
            let flags = xz2::stream::CONCATENATED;
            let stream = xz2::stream::Stream::new_stream_decoder(1 << 30, flags)
                .map_err(|e| unreadable(io::Error::other(e)))?;
            Box::new(xz2::bufread::XzDecoder::new_stream(whole, stream))
        }
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let mut d = zstd::stream::read::Decoder::with_buffer(whole).map_err(unreadable)?;
            d.window_log_max(29).map_err(unreadable)?;
            Box::new(d)
        }
        [b'B', b'Z', b'h', ..] => Box::new(bzip2::bufread::MultiBzDecoder::new(whole)),
        [b'h', b's', b'q', b's', ..] => {
            return Err(Error::invalid(
                field,
                "this is a squashfs image; it can only be the rootfs part of a split image",
            ));
        }
        _ => Box::new(whole),
    })
}
