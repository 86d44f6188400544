//! JSON objects over a stream socket, one a line, from a peer that may be hostile: QMP's and the guest agent's framing.
//!
//! A line is bounded, so is JSON's depth (serde_json stops at 128), and every wait of a caller has its own deadline.

use karst_model::{Error, Result};
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt};

/// Reads lines of at most `max` bytes.
#[derive(Debug)]
pub struct Lines<R> {
    source: R,
    buffer: Vec<u8>,
    /// Bytes of `buffer` that are known to hold no line end.
    searched: usize,
    max: usize,
}

impl<R: AsyncRead + Unpin> Lines<R> {
    /// Lines of `source`.
    pub fn new(source: R, max: usize) -> Self {
        Self { source, buffer: vec![], searched: 0, max }
    }

    /// The next line without its end; `None` at the end of the stream. Cancel safe: what was read stays.
    ///
    /// # Errors
    /// Too large for a line over the bound; the stream cannot be used any more then.
    pub async fn next(&mut self) -> Result<Option<Vec<u8>>> {
        loop {
            if let Some(i) = self.buffer[self.searched..].iter().position(|b| *b == b'\n') {
                let rest = self.buffer.split_off(self.searched + i + 1);
                let mut line = std::mem::replace(&mut self.buffer, rest);
                self.searched = 0;
                line.truncate(line.trim_ascii_end().len());
                return Ok(Some(line));
            }
            self.searched = self.buffer.len();
            if self.buffer.len() > self.max {
                self.buffer = vec![];
                return Err(Error::too_large("an answer is longer than is accepted"));
            }
            match self.source.read_buf(&mut self.buffer).await {
                Ok(0) => return Ok(None),
                // A peer that ends without having read all that it was sent.
                Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => return Ok(None),
                other => other?,
            };
        }
    }
}

/// Parses one line into an object.
///
/// # Errors
/// Internal when it is none.
pub fn object(line: &[u8]) -> Result<serde_json::Map<String, Value>> {
    match serde_json::from_slice(line) {
        Ok(Value::Object(o)) => Ok(o),
        Ok(_) => Err(Error::internal("an answer could not be understood", "not an object")),
        Err(e) => Err(Error::internal("an answer could not be understood", e)),
    }
}

/// Text of a peer for a message: printable, short.
pub fn printable(text: &str, max: usize) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(max).collect::<String>().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[tokio::test]
    async fn a_peer_that_ends_without_reading_all_has_ended() {
        let (ours, theirs) = tokio::net::UnixStream::pair().unwrap();
        ours.try_write(b"never read").unwrap();
        drop(theirs);
        assert_eq!(Lines::new(ours, 64).next().await.unwrap(), None);
    }

    fn all(data: &[u8], max: usize) -> (Vec<Vec<u8>>, bool) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let mut lines = Lines::new(data, max);
            let mut got = vec![];
            loop {
                match lines.next().await {
                    Ok(Some(l)) => got.push(l),
                    Ok(None) => return (got, true),
                    Err(_) => return (got, false),
                }
            }
        })
    }

    #[test]
    fn bounded_lines() {
        assert_eq!(
            all(b"{}\r\n\n{\"a\":1}\nrest", 100),
            (vec![b"{}".to_vec(), vec![], b"{\"a\":1}".to_vec()], true)
        );
        assert!(!all(&vec![b'x'; 100_000], 1000).1, "a line without end is refused");
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        assert!(object(format!("{{\"a\":{deep}}}").as_bytes()).is_err(), "depth is bounded");
    }

    proptest! {
        #[test]
        fn garbage_never_panics_and_lines_add_up(data in proptest::collection::vec(any::<u8>(), 0..4000)) {
            let (lines, whole) = all(&data, 10_000);
            prop_assert!(whole);
            prop_assert_eq!(lines.len(), data.iter().filter(|b| **b == b'\n').count());
            for l in lines { let _ = object(&l); }
        }
    }
}
