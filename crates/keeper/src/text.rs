//! `key=value` lines with escapes, as both files use them.

/// Appends `key=value`, with line feeds, NULs and backslashes escaped.
pub(crate) fn put(out: &mut Vec<u8>, key: &str, value: &[u8]) {
    out.extend_from_slice(key.as_bytes());
    out.push(b'=');
    for b in value {
        match b {
            b'\n' => out.extend_from_slice(b"\\n"),
            b'\\' => out.extend_from_slice(b"\\\\"),
            0 => out.extend_from_slice(b"\\0"),
            b => out.push(*b),
        }
    }
    out.push(b'\n');
}

/// The lines of `text` as key and unescaped value.
pub(crate) fn lines(text: &[u8]) -> impl Iterator<Item = Result<(&str, Vec<u8>), String>> {
    text.split(|b| *b == b'\n').filter(|l| !l.is_empty()).map(|line| {
        let at = line
            .iter()
            .position(|b| *b == b'=')
            .ok_or_else(|| format!("no '=' in line {:?}", String::from_utf8_lossy(line)))?;
        let key = std::str::from_utf8(&line[..at]).map_err(|_| "a key is not text".to_owned())?;
        let mut value = Vec::with_capacity(line.len() - at);
        let mut rest = line[at + 1..].iter();
        while let Some(b) = rest.next() {
            match b {
                b'\\' => match rest.next() {
                    Some(b'n') => value.push(b'\n'),
                    Some(b'0') => value.push(0),
                    Some(b'\\') => value.push(b'\\'),
                    _ => return Err(format!("bad escape in {key}")),
                },
                b => value.push(*b),
            }
        }
        Ok((key, value))
    })
}

/// A number out of a value.
pub(crate) fn number<T: std::str::FromStr>(key: &str, value: &[u8]) -> Result<T, String> {
    std::str::from_utf8(value)
        .ok()
        .and_then(|s| s.parse().ok())
        .ok_or_else(|| format!("{key}: {:?} is not a number", String::from_utf8_lossy(value)))
}

/// A string out of a value.
pub(crate) fn string(value: Vec<u8>) -> String {
    String::from_utf8(value).unwrap_or_else(|e| String::from_utf8_lossy(e.as_bytes()).into_owned())
}

/// `a.b` as two numbers.
pub(crate) fn pair(key: &str, value: &[u8]) -> Result<(u64, u64), String> {
    let at = value.iter().position(|b| *b == b'.').unwrap_or(value.len());
    Ok((number(key, &value[..at])?, number(key, value.get(at + 1..).unwrap_or_default())?))
}
