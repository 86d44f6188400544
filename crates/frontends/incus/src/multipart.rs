//! Streaming reader of `multipart/form-data` bodies (RFC 7578), as Incus' clients upload split images: parts are taken
//! one after the other, none is kept in memory.

use bytes::{Bytes, BytesMut};
use karst_model::{Error, Result};
use std::pin::Pin;

use futures::{Stream, StreamExt};

/// Longest header block of a part.
const HEADERS: usize = 16 << 10;

/// A body being read.
pub struct Multipart {
    source: Pin<Box<dyn Stream<Item = Result<Bytes>> + Send>>,
    buffer: BytesMut,
    delimiter: Vec<u8>,
    state: State,
}

#[derive(PartialEq, Eq)]
enum State {
    /// Before the first boundary.
    Start,
    /// Inside a part.
    Part,
    /// After a boundary, before the headers of a part.
    Headers,
    /// After the last boundary.
    End,
}

/// The boundary of a content type.
///
/// # Errors
/// Invalid, when there is none.
pub fn boundary(content_type: &str) -> Result<String> {
    let wrong = || Error::invalid("Content-Type", "the boundary of multipart/form-data is missing");
    let raw = content_type
        .split(';')
        .skip(1)
        .find_map(|p| p.trim().strip_prefix("boundary="))
        .ok_or_else(wrong)?
        .trim_matches('"');
    if raw.is_empty() || raw.len() > 70 || !raw.is_ascii() {
        return Err(wrong());
    }
    Ok(raw.to_owned())
}

fn broken(why: &str) -> Error {
    Error::invalid("body", format!("the multipart body is malformed: {why}"))
}

impl Multipart {
    /// Reads `source`, whose parts `boundary` separates.
    pub fn new(source: impl Stream<Item = Result<Bytes>> + Send + 'static, boundary: &str) -> Self {
        Self {
            source: Box::pin(source),
            // So that the first boundary is like the others.
            buffer: BytesMut::from(&b"\r\n"[..]),
            delimiter: format!("\r\n--{boundary}").into_bytes(),
            state: State::Start,
        }
    }

    async fn fill(&mut self) -> Result<()> {
        match self.source.next().await {
            Some(bytes) => {
                self.buffer.extend_from_slice(&bytes?);
                Ok(())
            }
            None => Err(broken("it ends before its last boundary")),
        }
    }

    /// The next part: its name and file name. What is left of the one before is skipped.
    ///
    /// # Errors
    /// Invalid, when the body is malformed or breaks off.
    pub async fn part(&mut self) -> Result<Option<(String, Option<String>)>> {
        while matches!(self.state, State::Start | State::Part) {
            if self.data().await?.is_none() && self.state == State::Start {
                self.state = State::Headers;
            }
        }
        if self.state == State::End {
            return Ok(None);
        }
        // After the boundary: the end of its line, or `--` for the last.
        while self.buffer.len() < 2 {
            self.fill().await?;
        }
        if self.buffer.starts_with(b"--") {
            self.state = State::End;
            return Ok(None);
        }
        let end = loop {
            if let Some(at) = find(&self.buffer, b"\r\n\r\n") {
                break at;
            }
            if self.buffer.len() > HEADERS {
                return Err(broken("the headers of a part are too long"));
            }
            self.fill().await?;
        };
        let head = self.buffer.split_to(end + 4);
        let head = String::from_utf8_lossy(&head);
        let disposition = head
            .lines()
            .find_map(|l| {
                let (name, value) = l.split_once(':')?;
                name.trim().eq_ignore_ascii_case("content-disposition").then(|| value.to_owned())
            })
            .ok_or_else(|| broken("a part has no Content-Disposition"))?;
        let get = |key: &str| {
            disposition.split(';').skip(1).find_map(|p| {
                let (k, v) = p.trim().split_once('=')?;
                (k == key).then(|| v.trim_matches('"').to_owned())
            })
        };
        let name = get("name").ok_or_else(|| broken("a part has no name"))?;
        self.state = State::Part;
        Ok(Some((name, get("filename"))))
    }

    /// More of the part; `None` at its end.
    ///
    /// # Errors
    /// Invalid, when the body breaks off.
    pub async fn data(&mut self) -> Result<Option<Bytes>> {
        if !matches!(self.state, State::Part | State::Start) {
            return Ok(None);
        }
        loop {
            if let Some(at) = find(&self.buffer, &self.delimiter) {
                if at > 0 {
                    return Ok(Some(self.buffer.split_to(at).freeze()));
                }
                let _ = self.buffer.split_to(self.delimiter.len());
                self.state = State::Headers;
                return Ok(None);
            }
            // All but what may be the beginning of a boundary.
            let safe = self.buffer.len().saturating_sub(self.delimiter.len() - 1);
            if safe > 0 {
                return Ok(Some(self.buffer.split_to(safe).freeze()));
            }
            self.fill().await?;
        }
    }
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    let first = *needle.first()?;
    let mut from = 0;
    while let Some(i) = haystack.get(from..)?.iter().position(|b| *b == first) {
        let at = from + i;
        if haystack[at..].starts_with(needle) {
            return Some(at);
        }
        from = at + 1;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn chunks(body: &[u8], size: usize) -> impl Stream<Item = Result<Bytes>> + Send + 'static {
        let all: Vec<_> = body.chunks(size.max(1)).map(|c| Ok(Bytes::copy_from_slice(c))).collect();
        futures::stream::iter(all)
    }

    async fn read(body: &[u8], size: usize) -> Result<Vec<(String, Vec<u8>)>> {
        let mut m = Multipart::new(chunks(body, size), "XX");
        let mut out = vec![];
        while let Some((name, _)) = m.part().await? {
            let mut data = vec![];
            while let Some(d) = m.data().await? {
                data.extend_from_slice(&d);
            }
            out.push((name, data));
        }
        Ok(out)
    }

    proptest! {
        #[test]
        fn any_content_in_any_pieces(a in proptest::collection::vec(any::<u8>(), 0..200), b in "[\r\nX-]{0,40}", size in 1usize..50) {
            let mut body = b"--XX\r\nContent-Disposition: form-data; name=\"metadata\"; filename=\"m.tar\"\r\nContent-Type: application/octet-stream\r\n\r\n".to_vec();
            body.extend_from_slice(&a);
            body.extend_from_slice(b"\r\n--XX\r\nContent-Disposition: form-data; name=\"rootfs\"\r\n\r\n");
            body.extend_from_slice(b.as_bytes());
            body.extend_from_slice(b"\r\n--XX--\r\n");
            prop_assume!(find(&a, b"\r\n--XX").is_none() && !b.contains("--XX"));
            let got = tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(read(&body, size)).unwrap();
            prop_assert_eq!(got, vec![("metadata".to_owned(), a), ("rootfs".to_owned(), b.into_bytes())]);
        }
    }

    #[tokio::test]
    async fn what_breaks_off_is_refused() {
        for bad in [
            &b""[..],
            b"--XX\r\n",
            b"--XX\r\nA: b\r\n\r\nx\r\n--XX--",
            b"--XX\r\nContent-Disposition: form-data; name=\"a\"\r\n\r\nabc",
        ] {
            assert!(read(bad, 7).await.is_err(), "{}", String::from_utf8_lossy(bad));
        }
        assert!(boundary("multipart/form-data").is_err());
        assert_eq!(boundary("multipart/form-data; boundary=\"ab\"").unwrap(), "ab");
    }
}
