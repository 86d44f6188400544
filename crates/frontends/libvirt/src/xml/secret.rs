//! Secrets as XML: what they are for, never what they are.

use super::{Element, read::document};
use crate::error::{Code, Part, VirError};
use karst_engine::secrets::DefineSecret;
use karst_model::secret::{Secret, SecretUse};
use uuid::Uuid;

fn wrong(text: impl Into<String>) -> VirError {
    VirError::new(Code::XmlError, Part::Secret, text)
}

/// The element in `<usage>` that says with what a secret of a kind is used.
fn used_with(kind: SecretUse) -> &'static str {
    match kind {
        SecretUse::Volume => "volume",
        SecretUse::Iscsi => "target",
        SecretUse::None | SecretUse::Ceph | SecretUse::Tls | SecretUse::Vtpm => "name",
    }
}

/// `virSecretUsageType`
pub fn number(kind: SecretUse) -> i32 {
    SecretUse::ALL.iter().position(|k| *k == kind).map_or(0, |n| n as i32)
}

/// The kind of a `virSecretUsageType`.
pub fn kind(number: i32) -> Option<SecretUse> {
    SecretUse::ALL.get(usize::try_from(number).ok()?).copied()
}

/// The document of a secret.
pub fn write(secret: &Secret) -> String {
    let yes = |v: bool| if v { "yes" } else { "no" };
    let mut e = Element::new("secret")
        .with("ephemeral", yes(secret.ephemeral))
        .with("private", yes(secret.private))
        .child(Element::text("uuid", secret.uuid));
    if !secret.description.is_empty() {
        e.push(Element::text("description", &secret.description));
    }
    if secret.kind != SecretUse::None {
        let with = Element::text(used_with(secret.kind), &secret.usage);
        e.push(Element::new("usage").with("type", secret.kind.as_str()).child(with));
    }
    e.document()
}

/// Reads the document of a secret.
///
/// # Errors
/// XML error, naming the element; CONFIG_UNSUPPORTED for another kind of use.
pub fn read(text: &str) -> Result<DefineSecret, VirError> {
    let root = document(text)?;
    if root.name() != "secret" {
        return Err(wrong(format!("unexpected root element <{}>, expecting <secret>", root.name())));
    }
    let flag = |name: &str| match root.attribute(name) {
        None | Some("no") => Ok(false),
        Some("yes") => Ok(true),
        Some(other) => {
            Err(wrong(format!("Invalid value for attribute '{name}' in element 'secret': '{other}'.")))
        }
    };
    let body = |name: &str| root.find(name).map(|e| e.body().trim()).filter(|t| !t.is_empty());
    let uuid =
        body("uuid").map(|u| Uuid::parse_str(u).map_err(|_| wrong(format!("malformed uuid element '{u}'"))));
    let (kind, usage) = match root.find("usage") {
        None => (SecretUse::None, String::new()),
        Some(usage) => {
            let word = usage.attribute("type").ok_or_else(|| wrong("unknown secret usage type"))?;
            let kind = SecretUse::ALL.iter().copied().find(|k| k.as_str() == word).ok_or_else(|| {
                let text = format!("unknown secret usage type {word}");
                VirError::new(Code::ConfigUnsupported, Part::Secret, text)
            })?;
            let with = usage.find(used_with(kind)).map(|e| e.body().trim().to_owned()).unwrap_or_default();
            if kind != SecretUse::None && with.is_empty() {
                let text = format!("{word} usage specified, but <{}> is missing", used_with(kind));
                return Err(wrong(text));
            }
            (kind, if kind == SecretUse::None { String::new() } else { with })
        }
    };
    Ok(DefineSecret {
        uuid: uuid.transpose()?,
        description: body("description").unwrap_or_default().to_owned(),
        kind,
        usage,
        private: flag("private")?,
        ephemeral: flag("ephemeral")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use karst_model::ProjectId;

    #[test]
    fn documents_are_read_as_they_are_written() {
        for n in 0..=5 {
            let kind = kind(n).unwrap();
            let secret = Secret {
                uuid: Uuid::from_u128(7),
                project: ProjectId(Uuid::nil()),
                description: "of <a> test".into(),
                kind,
                usage: if n == 0 { String::new() } else { "/karst/default/v & more".into() },
                private: n % 2 == 0,
                ephemeral: n > 2,
                sealed: None,
                spec_version: 1,
            };
            let read = read(&write(&secret)).unwrap();
            assert_eq!((number(read.kind), read.usage, read.uuid), (n, secret.usage, Some(secret.uuid)));
            assert_eq!((read.private, read.ephemeral), (secret.private, secret.ephemeral));
            assert_eq!(read.description, secret.description);
        }
        assert!(kind(6).is_none() && kind(-1).is_none());
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, code, word) in [
            ("<secret", Code::XmlError, ""),
            ("<domain/>", Code::XmlError, "<secret>"),
            ("<secret private='maybe'/>", Code::XmlError, "private"),
            ("<secret ephemeral=''/>", Code::XmlError, "ephemeral"),
            ("<secret><uuid>x</uuid></secret>", Code::XmlError, "uuid"),
            ("<secret><usage/></secret>", Code::XmlError, "usage type"),
            ("<secret><usage type='nfs'/></secret>", Code::ConfigUnsupported, "nfs"),
            ("<secret><usage type='volume'/></secret>", Code::XmlError, "<volume>"),
            ("<secret><usage type='iscsi'><name>x</name></usage></secret>", Code::XmlError, "<target>"),
        ] {
            let e = read(text).unwrap_err();
            assert!(e.code == code && e.text.contains(word), "{text}: {e:?}");
        }
    }
}
