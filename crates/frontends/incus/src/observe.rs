//! What handlers read of requests: which fields, parameters of the query and headers, and as what. Tests hold it against the
//! description of the API ([`crate::describe`]), so that neither says more than the other.
//!
//! Nothing is noted unless somebody asked for it ([`crate::App::record`]).

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
};

/// As what a field is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum FieldKind {
    /// A text, also one that says a time, or one of some words.
    Text,
    /// `true` or `false`.
    Flag,
    /// A whole number.
    Integer,
    /// A list of texts.
    Texts,
    /// An object with known fields.
    Object,
    /// Texts by key.
    Config,
    /// Texts by key by name.
    Devices,
    /// The handler looks for itself.
    Any,
}

/// Something that was read.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Read {
    /// A parameter of the query.
    Query(String),
    /// A header, in lower case.
    Header(String),
    /// A field of the body, by its path.
    Field(String, FieldKind),
    /// A field that is taken without meaning.
    Carried(String),
}

/// What one request had read of it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Reads(Arc<Mutex<BTreeSet<Read>>>);

impl Reads {
    /// All so far.
    pub(crate) fn take(&self) -> BTreeSet<Read> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(|e| e.into_inner()))
    }
}

/// Gets what requests had read of them, each with the place of its row in the table.
pub type Recorder = Box<dyn Fn(usize, BTreeSet<Read>) + Send + Sync>;

tokio::task_local! {
    static READS: Reads;
}

/// Answers what `handler` does, and notes meanwhile what it reads.
pub(crate) async fn during<F: Future>(reads: &Reads, handler: F) -> F::Output {
    READS.scope(reads.clone(), handler).await
}

/// Something is read.
pub(crate) fn note(read: impl FnOnce() -> Read) {
    // Outside of a recorded request there is nobody to tell it to.
    let _ = READS.try_with(|reads| {
        reads.0.lock().unwrap_or_else(|e| e.into_inner()).insert(read());
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_what_is_asked_for_is_noted() {
        note(|| unreachable!("nobody asked"));
        let reads = Reads::default();
        let read = Read::Query("project".into());
        during(&reads, async { note(|| read.clone()) }).await;
        assert_eq!(reads.take(), BTreeSet::from([read]));
        note(|| unreachable!("it is over"));
        assert!(reads.take().is_empty());
    }
}
