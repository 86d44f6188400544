//! What goes over the wire: views of the model's records in Incus' JSON, field for field as Incus 6.0 writes them.

pub mod firewall;
pub mod image;
pub mod instance;
pub mod misc;
pub mod operation;
pub mod snapshot;

use jiff::Timestamp;
use serde::Serializer;

/// Go's zero time.
pub const NEVER: &str = "0001-01-01T00:00:00Z";
/// What Incus says of the location of everything on a server that is not clustered.
pub const NOWHERE: &str = "none";

/// An optional time; absent is Go's zero time.
pub fn time<S: Serializer>(t: &Option<Timestamp>, s: S) -> Result<S::Ok, S::Error> {
    match t {
        Some(t) => s.collect_str(t),
        None => s.serialize_str(NEVER),
    }
}

/// An optional time; absent is the epoch, as Incus says of an instance that was never started.
pub fn time_or_epoch<S: Serializer>(t: &Option<Timestamp>, s: S) -> Result<S::Ok, S::Error> {
    s.collect_str(&t.unwrap_or(Timestamp::UNIX_EPOCH))
}

/// Percent-encodes a name for use as one segment of a path.
pub fn segment(name: &str) -> String {
    use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
    const SET: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');
    utf8_percent_encode(name, SET).to_string()
}

/// The path of an object: `/1.0/KIND/NAME`, with the project unless it is the default one.
pub fn path(kind: &str, name: &str, project: &str) -> String {
    let name = segment(name);
    if project == karst_model::project::DEFAULT_PROJECT {
        format!("/1.0/{kind}/{name}")
    } else {
        format!("/1.0/{kind}/{name}?project={}", segment(project))
    }
}
