//! Paths of the API, escaped segment by segment, so that no name can reach into another path.

use percent_encoding::{AsciiSet, CONTROLS, NON_ALPHANUMERIC, utf8_percent_encode};

/// Everything that a path segment may not hold as it is.
const SEGMENT: &AsciiSet = &CONTROLS
    .add(b' ')
    .add(b'"')
    .add(b'#')
    .add(b'%')
    .add(b'/')
    .add(b'<')
    .add(b'>')
    .add(b'?')
    .add(b'[')
    .add(b']')
    .add(b'\\')
    .add(b'^')
    .add(b'`')
    .add(b'{')
    .add(b'|')
    .add(b'}');

/// Unreserved characters of RFC 3986 stay readable in queries.
const QUERY: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~').remove(b'/');

/// A path under the server with its query.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Url {
    path: String,
    query: Vec<(String, String)>,
}

impl Url {
    /// `/1.0/` and the segments, each escaped.
    pub fn new(segments: &[&str]) -> Self {
        let mut path = String::from("/1.0");
        for segment in segments {
            path.push('/');
            path.extend(utf8_percent_encode(segment, SEGMENT));
        }
        Self { path, query: Vec::new() }
    }

    /// A path as the user or the server wrote it, with its query.
    pub fn raw(text: &str) -> Self {
        let (path, query) = text.split_once('?').unwrap_or((text, ""));
        let query = query
            .split('&')
            .filter(|pair| !pair.is_empty())
            .map(|pair| {
                let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
                (decode(key), decode(value))
            })
            .collect();
        Self { path: path.to_owned(), query }
    }

    /// With one more path segment.
    pub fn join(mut self, segment: &str) -> Self {
        self.path.push('/');
        self.path.extend(utf8_percent_encode(segment, SEGMENT));
        self
    }

    /// With one more query parameter.
    pub fn with(mut self, key: &str, value: impl ToString) -> Self {
        self.query.push((key.to_owned(), value.to_string()));
        self
    }

    /// What stands in the request line; `project` is added unless the query names one already.
    pub fn render(&self, project: Option<&str>) -> String {
        let mut text = self.path.clone();
        let named = self.query.iter().any(|(key, _)| key == "project" || key == "all-projects");
        let project = project.filter(|_| !named).map(|name| ("project", name));
        let pairs = self.query.iter().map(|(key, value)| (key.as_str(), value.as_str())).chain(project);
        for (index, (key, value)) in pairs.enumerate() {
            text.push(if index == 0 { '?' } else { '&' });
            text.extend(utf8_percent_encode(key, QUERY));
            text.push('=');
            text.extend(utf8_percent_encode(value, QUERY));
        }
        text
    }
}

/// Undoes the escaping of one query part.
fn decode(text: &str) -> String {
    percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned()
}

/// The last segment of an API path, unescaped: `/1.0/instances/c1?project=p` is `c1`.
pub fn last_segment(url: &str) -> String {
    let path = url.split('?').next().unwrap_or(url);
    decode(path.rsplit('/').next().unwrap_or(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_leave_their_segment() {
        assert_eq!(
            Url::new(&["instances", "a/../b?x=1#y"]).render(None),
            "/1.0/instances/a%2F..%2Fb%3Fx=1%23y"
        );
    }

    #[test]
    fn project_is_added_once() {
        let url = Url::new(&["instances"]).with("recursion", 2);
        assert_eq!(url.render(Some("p q")), "/1.0/instances?recursion=2&project=p%20q");
        assert_eq!(
            url.with("all-projects", true).render(Some("p")),
            "/1.0/instances?recursion=2&all-projects=true"
        );
    }

    #[test]
    fn raw_urls_keep_their_query() {
        let url = Url::raw("/1.0/operations/x?project=a%26b&secret=s");
        assert_eq!(url.render(Some("other")), "/1.0/operations/x?project=a%26b&secret=s");
    }

    #[test]
    fn last_segments() {
        assert_eq!(last_segment("/1.0/instances/c1?project=p"), "c1");
        assert_eq!(last_segment("/1.0/storage-pools/a%20b"), "a b");
    }
}
