//! Pages of a list (`karst_paging`): `limit=50` is the first one, `after=NAME` goes on behind a name, and the answer's header
//! `link` (RFC 8288, `rel="next"`) says where the next page is, as long as there is one.
//!
//! A place is a name, not a number: what is made or deleted meanwhile shifts nothing, and the name may be gone by then.

use crate::{request::Query, respond::Reply};
use hyper::header::{HeaderValue, LINK};
use karst_model::{Error, Result};

/// Most of a page.
const MOST: usize = 1000;
/// Looked at by a filter at a time.
const AT_A_TIME: usize = 256;

/// Which page was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Page {
    limit: usize,
    /// Project and name; in the list of one project the name alone.
    after: Option<(Option<String>, String)>,
}

impl Page {
    /// `limit` and `after` of a query; `None` where neither is there.
    ///
    /// # Errors
    /// Invalid.
    pub(crate) fn of(query: &Query) -> Result<Option<Self>> {
        let limit = query.integer("limit")?;
        let after = query.get("after");
        if limit.is_none() && after.is_none() {
            return Ok(None);
        }
        let limit = match limit {
            None => MOST,
            Some(n) => usize::try_from(n).ok().filter(|n| (1..=MOST).contains(n)).ok_or_else(|| {
                Error::invalid("limit", format!("limit={n} is not a number of instances from 1 to {MOST}"))
            })?,
        };
        let after = after
            .map(|text| match (query.flag("all-projects"), text.split_once('/')) {
                (true, Some((project, name))) => Ok((Some(project.to_owned()), name.to_owned())),
                (false, None) => Ok((None, text.to_owned())),
                (true, None) => {
                    Err(Error::invalid("after", "in the list of all projects a place is PROJECT/NAME"))
                }
                (false, Some(_)) => {
                    Err(Error::invalid("after", "in the list of one project a place is a name"))
                }
            })
            .transpose()?;
        Ok(Some(Self { limit, after }))
    }

    /// Leaves the page of `all`, of those that `accepts` says yes to (which answers for each that it gets); the place after
    /// which the next one goes on, if there is one.
    ///
    /// # Errors
    /// Those of `accepts`.
    pub(crate) fn cut<T: Clone + std::ops::Deref>(
        &self,
        all: &mut Vec<T>,
        place: impl Fn(&T::Target) -> (&str, &str),
        accepts: impl Fn(&[T]) -> Result<Vec<bool>>,
    ) -> Result<Option<String>> {
        all.sort_by(|a, b| place(&**a).cmp(&place(&**b)));
        let behind = |item: &T| match &self.after {
            None => true,
            Some((None, name)) => place(&**item).1 > name.as_str(),
            Some((Some(project), name)) => place(&**item) > (project.as_str(), name.as_str()),
        };
        let start = all.partition_point(|item| !behind(item));
        let mut kept: Vec<T> = vec![];
        let mut more = false;
        for some in all[start..].chunks(AT_A_TIME) {
            let accepted = accepts(some)?;
            let mut found = some.iter().zip(accepted).filter(|(_, yes)| *yes).map(|(item, _)| item);
            let room = self.limit - kept.len();
            kept.extend(found.by_ref().take(room).cloned());
            more = found.next().is_some();
            if more {
                break;
            }
        }
        let next = kept.last().filter(|_| more).map(|item| {
            let (project, name) = place(&**item);
            format!("{project}/{name}")
        });
        *all = kept;
        Ok(next)
    }
}

/// The header that says where the next page is: behind `place` (PROJECT/NAME).
///
/// # Errors
/// Internal.
pub(crate) fn next_link(query: &Query, place: Option<&str>) -> Result<Option<HeaderValue>> {
    let Some(place) = place else { return Ok(None) };
    let place = match query.flag("all-projects") {
        true => place,
        false => place.split_once('/').map_or(place, |(_, name)| name),
    };
    HeaderValue::from_str(&format!("</1.0/instances?{}>; rel=\"next\"", query_with(query, place)))
        .map(Some)
        .map_err(|e| Error::internal("an answer could not be encoded", e))
}

/// The answer with that header.
pub(crate) fn linked(mut reply: Reply, link: Option<HeaderValue>) -> Reply {
    if let Some(link) = link {
        reply.headers_mut().insert(LINK, link);
    }
    reply
}

/// The same query with another place.
fn query_with(query: &Query, place: &str) -> String {
    let others = query.pairs().filter(|(k, _)| *k != "after");
    let pair = |(k, v): (&str, &str)| format!("{}={}", encoded(k), encoded(v));
    others.chain([("after", place)]).map(pair).collect::<Vec<_>>().join("&")
}

fn encoded(text: &str) -> String {
    let byte = |b: u8| match b {
        b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => {
            char::from(b).to_string()
        }
        _ => format!("%{b:02X}"),
    };
    text.bytes().map(byte).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn page(query: &str) -> Result<Option<Page>> {
        Page::of(&Query::parse(Some(query)).unwrap())
    }

    #[test]
    fn what_is_no_page_is_refused() {
        assert_eq!(page("recursion=1").unwrap(), None);
        for (query, field) in [
            ("limit=0", "limit"),
            ("limit=-1", "limit"),
            ("limit=1001", "limit"),
            ("limit=x", "limit"),
            ("after=a/b", "after"),
            ("all-projects=true&after=a", "after"),
        ] {
            assert_eq!(page(query).unwrap_err().field.as_deref(), Some(field), "{query}");
        }
    }

    #[test]
    fn pages_have_everything_once() {
        let things: Vec<Arc<(String, String)>> =
            (0..1500).map(|n| Arc::new((format!("p{}", n % 3), format!("i{:04}", 1499 - n)))).collect();
        fn of(t: &(String, String)) -> (&str, &str) {
            (&t.0, &t.1)
        }
        let (mut found, mut after) = (vec![], String::new());
        loop {
            let page = page(&format!("all-projects=1&limit=97{after}")).unwrap().unwrap();
            let mut all = things.clone();
            let even = |some: &[Arc<(String, String)>]| {
                Ok(some.iter().map(|t| t.1.ends_with(['0', '2', '4', '6', '8'])).collect())
            };
            let next = page.cut(&mut all, of, even).unwrap();
            assert!(all.len() <= 97 && (next.is_none() || all.len() == 97));
            found.extend(all);
            match next {
                Some(next) => after = format!("&after={next}"),
                None => break,
            }
        }
        assert_eq!(found.len(), 750);
        assert!(found.windows(2).all(|w| of(&w[0]) < of(&w[1])));
        // Behind a name that is not there any more.
        let gone = page("all-projects=1&limit=1&after=p1/i0000x").unwrap().unwrap();
        let mut all = things.clone();
        gone.cut(&mut all, of, |some| Ok(vec![true; some.len()])).unwrap();
        assert!(of(&all[0]) > ("p1", "i0000x"));
    }

    #[test]
    fn the_next_page_is_the_same_question() {
        let query = Query::parse(Some("recursion=1&filter=name+eq+%22a%22&after=old&limit=5")).unwrap();
        assert_eq!(query_with(&query, "web.1"), "recursion=1&filter=name%20eq%20%22a%22&limit=5&after=web.1");
    }
}
