//! `multipart/form-data`, in which images travel whose metadata and disk are apart; read and written as a stream.

use std::io;

use bytes::{Buf, Bytes, BytesMut};
use futures::{Stream, StreamExt, stream};

/// Cap on the headers of one part.
const LARGEST_HEAD: usize = 16 * 1024;

/// Type of a boxed stream of bytes.
type Chunks = futures::stream::BoxStream<'static, io::Result<Bytes>>;

/// One part to be sent.
pub struct Part {
    /// Name of the form field.
    pub name: &'static str,
    /// Name of the file.
    pub filename: String,
    /// Contents.
    pub chunks: Chunks,
}

/// The parts one after the other, with this boundary between them.
pub fn encode(boundary: &str, parts: Vec<Part>) -> impl Stream<Item = io::Result<Bytes>> + Send + use<> {
    let end = format!("--{boundary}--\r\n");
    let boundary = boundary.to_owned();
    let parts = parts.into_iter().map(move |part| {
        // Quotes and line ends would leave the header.
        let filename = part.filename.replace(['"', '\r', '\n', '\\'], "_");
        let head = format!(
            "--{boundary}\r\nContent-Disposition: form-data; name=\"{}\"; filename=\"{filename}\"\r\n\
             Content-Type: application/octet-stream\r\n\r\n",
            part.name
        );
        let line = |text: String| stream::iter([Ok(Bytes::from(text))]);
        line(head).chain(part.chunks).chain(line("\r\n".to_owned())).boxed()
    });
    stream::iter(parts.collect::<Vec<_>>()).flatten().chain(stream::iter([Ok(Bytes::from(end))]))
}

/// The boundary in a `Content-Type`, if it is multipart.
pub fn boundary(content_type: &str) -> Option<String> {
    let rest = content_type.strip_prefix("multipart/form-data")?;
    let value = rest.split(';').find_map(|parameter| parameter.trim().strip_prefix("boundary="))?;
    let value = value.trim_matches('"');
    (!value.is_empty()).then(|| value.to_owned())
}

/// Takes a body apart.
pub struct Reader<S> {
    chunks: S,
    /// `CR LF -- boundary`: what ends a part.
    delimiter: Vec<u8>,
    buffer: BytesMut,
    in_part: bool,
}

impl<S: Stream<Item = io::Result<Bytes>> + Unpin> Reader<S> {
    /// Of a body with this boundary.
    pub fn new(chunks: S, boundary: &str) -> Self {
        let delimiter = format!("\r\n--{boundary}").into_bytes();
        // The first boundary has no line before it: with one put in front all are alike.
        Self { chunks, delimiter, buffer: BytesMut::from(&b"\r\n"[..]), in_part: true }
    }

    /// The file name of the next part; `None` after the last.
    pub async fn next_part(&mut self) -> io::Result<Option<String>> {
        while self.next_chunk().await?.is_some() {}
        while self.buffer.len() < 2 {
            self.fill().await?;
        }
        if self.buffer.starts_with(b"--") {
            return Ok(None);
        }
        let end = loop {
            if let Some(end) = find(&self.buffer, b"\r\n\r\n") {
                break end;
            }
            if self.buffer.len() > LARGEST_HEAD {
                return Err(broken());
            }
            self.fill().await?;
        };
        let head = String::from_utf8_lossy(&self.buffer[..end]).into_owned();
        self.buffer.advance(end + 4);
        self.in_part = true;
        let name = head.split(['\r', '\n', ';']).find_map(|word| word.trim().strip_prefix("filename="));
        Ok(Some(name.unwrap_or_default().trim_matches('"').to_owned()))
    }

    /// More of this part; `None` at its end.
    pub async fn next_chunk(&mut self) -> io::Result<Option<Bytes>> {
        while self.in_part {
            if let Some(end) = find(&self.buffer, &self.delimiter) {
                let data = self.buffer.split_to(end).freeze();
                self.buffer.advance(self.delimiter.len());
                self.in_part = false;
                return Ok((!data.is_empty()).then_some(data));
            }
            // The last bytes may be the beginning of a delimiter.
            let safe = self.buffer.len().saturating_sub(self.delimiter.len() - 1);
            if safe > 0 {
                return Ok(Some(self.buffer.split_to(safe).freeze()));
            }
            self.fill().await?;
        }
        Ok(None)
    }

    async fn fill(&mut self) -> io::Result<()> {
        match self.chunks.next().await {
            Some(chunk) => self.buffer.extend_from_slice(&chunk?),
            None => return Err(broken()),
        }
        Ok(())
    }
}

fn broken() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the server's answer ends in the middle of a file")
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    let first = needle[0];
    let mut from = 0;
    while let Some(at) = haystack.get(from..)?.iter().position(|byte| *byte == first) {
        let start = from + at;
        if haystack[start..].starts_with(needle) {
            return Some(start);
        }
        from = start + 1;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(name: &'static str, filename: &str, data: &'static [u8]) -> Part {
        Part {
            name,
            filename: filename.to_owned(),
            chunks: stream::iter([Ok(Bytes::from_static(data))]).boxed(),
        }
    }

    async fn read(body: &[u8], step: usize) -> io::Result<Vec<(String, Vec<u8>)>> {
        let chunks: Vec<io::Result<Bytes>> =
            body.chunks(step).map(|chunk| Ok(Bytes::copy_from_slice(chunk))).collect();
        let mut reader = Reader::new(stream::iter(chunks), "b0undary");
        let mut parts = Vec::new();
        while let Some(name) = reader.next_part().await? {
            let mut data = Vec::new();
            while let Some(chunk) = reader.next_chunk().await? {
                data.extend_from_slice(&chunk);
            }
            parts.push((name, data));
        }
        Ok(parts)
    }

    #[tokio::test]
    async fn what_is_written_is_read_in_any_chunks() {
        let parts = vec![
            part("metadata", "meta.tar.xz", b"first\r\n--b0undar\r\n\r\nnot the end"),
            part("rootfs.img", "disk\".qcow2", b"\r\n\r\n\x00\xff--"),
            part("empty", "empty", b""),
        ];
        let encoded = encode("b0undary", parts).map(Result::unwrap).collect::<Vec<_>>().await.concat();
        for step in [1, 2, 3, 7, 64, 4096] {
            let read = read(&encoded, step).await.unwrap();
            assert_eq!(read.len(), 3, "step {step}");
            assert_eq!(
                read[0],
                ("meta.tar.xz".to_owned(), b"first\r\n--b0undar\r\n\r\nnot the end".to_vec())
            );
            assert_eq!(read[1], ("disk_.qcow2".to_owned(), b"\r\n\r\n\x00\xff--".to_vec()));
            assert_eq!(read[2], ("empty".to_owned(), Vec::new()));
        }
        let error = read(&encoded[..encoded.len() / 2], 5).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn boundaries() {
        assert_eq!(boundary("multipart/form-data; boundary=abc").as_deref(), Some("abc"));
        assert_eq!(boundary("multipart/form-data; charset=x; boundary=\"a b\"").as_deref(), Some("a b"));
        assert_eq!(boundary("application/octet-stream"), None);
    }
}
