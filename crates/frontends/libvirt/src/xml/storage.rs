//! Pools and volumes as XML.

use super::Element;
use karst_model::storage::{Pool, Usage, Volume, VolumeContent};

fn bytes(name: &'static str, n: u64) -> Element {
    Element::text(name, n).with("unit", "bytes")
}

/// The document of a pool. Its place on the host is not told: the target is the name under which volumes have their paths.
pub fn pool(pool: &Pool, usage: Usage) -> String {
    Element::new("pool")
        .with("type", "dir")
        .child(Element::text("name", &pool.name))
        .child(Element::text("uuid", pool.id))
        .child(bytes("capacity", usage.total))
        .child(bytes("allocation", usage.used))
        .child(bytes("available", usage.total.saturating_sub(usage.used)))
        .child(Element::new("source"))
        .child(Element::new("target").child(Element::text("path", format!("/karst/{}", pool.name))))
        .document()
}

/// The document of a volume.
pub fn volume(volume: &Volume, name: &str, path: &str, capacity: u64, allocation: u64) -> String {
    let (kind, format) = match volume.content {
        VolumeContent::Block => ("file", "raw"),
        VolumeContent::Iso => ("file", "iso"),
        VolumeContent::Filesystem => ("dir", "dir"),
    };
    Element::new("volume")
        .with("type", kind)
        .child(Element::text("name", name))
        .child(Element::text("key", volume.id))
        .child(bytes("capacity", capacity))
        .child(bytes("allocation", allocation))
        .child(
            Element::new("target")
                .child(Element::text("path", path))
                .child(Element::new("format").with("type", format)),
        )
        .document()
}
