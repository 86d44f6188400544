//! Encryption of disks and volumes: `<encryption format='luks'>` with the secret that opens it. Pure: a secret that is named by what it
//! is used with is found by the calls ([`by_uuid`]). Source: libvirt's `docs/formatstorageencryption.rst`.

use super::Element;
use crate::error::{Code, Part, VirError};
use karst_model::encryption::{Cipher, Encryption, Hash, Iv, Mode};
use uuid::Uuid;

/// The name of the element.
pub const NAME: &str = "encryption";

/// Which secret opens it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SecretName {
    /// By its UUID.
    Uuid(Uuid),
    /// By what it is used with.
    Usage(String),
}

impl std::fmt::Display for SecretName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Uuid(uuid) => uuid.fmt(f),
            Self::Usage(usage) => f.write_str(usage),
        }
    }
}

fn refuse(part: Part, why: impl std::fmt::Display) -> VirError {
    VirError::new(Code::ConfigUnsupported, part, format!("{NAME}: {why}"))
}

fn wrong(part: Part, text: impl Into<String>) -> VirError {
    VirError::new(Code::XmlError, part, text)
}

/// The secret in an element that says what is LUKS, read by QEMU.
fn secret(e: &Element, part: Part) -> Result<SecretName, VirError> {
    match e.attribute("format") {
        Some("luks") => {}
        Some(other) => return Err(refuse(part, format!("format '{other}' is not there; luks is"))),
        None => return Err(wrong(part, "missing format of encryption")),
    }
    if let Some(other) = e.attribute("engine").filter(|engine| *engine != "qemu") {
        return Err(refuse(part, format!("engine '{other}' is not there; qemu is")));
    }
    let mut all = e.all("secret");
    let (Some(one), None) = (all.next(), all.next()) else {
        return Err(refuse(part, "one secret opens it, as its element <secret> says"));
    };
    if let Some(other) = one.attribute("type").filter(|kind| *kind != "passphrase") {
        return Err(refuse(part, format!("a secret of type '{other}' is not there; passphrase is")));
    }
    match (one.attribute("uuid"), one.attribute("usage")) {
        (Some(text), None) => match Uuid::parse_str(text) {
            Ok(uuid) => Ok(SecretName::Uuid(uuid)),
            Err(_) => Err(wrong(part, format!("malformed volume encryption uuid '{text}'"))),
        },
        (None, Some(usage)) if !usage.is_empty() => Ok(SecretName::Usage(usage.to_owned())),
        _ => Err(wrong(part, "a secret of an encryption has a uuid, or a usage")),
    }
}

/// What opens a disk: in its source, or beside it, where older documents have it.
///
/// # Errors
/// XML error; CONFIG_UNSUPPORTED for another kind than LUKS.
pub fn of_disk(disk: &Element) -> Result<Option<SecretName>, VirError> {
    let within = disk.find("source").and_then(|s| s.find(NAME));
    let found = match (within, disk.find(NAME)) {
        (Some(_), Some(_)) => {
            return Err(wrong(
                Part::Domain,
                "encryption is said of the disk, and of its source; one is enough",
            ));
        }
        (one, other) => one.or(other),
    };
    let Some(e) = found else { return Ok(None) };
    if let Some(name) = ["cipher", "ivgen"].into_iter().find(|name| e.find(name).is_some()) {
        let text = format!("<{name}> is said of volumes that are made, and not of disks, which know it");
        return Err(refuse(Part::Qemu, text));
    }
    secret(e, Part::Qemu).map(Some)
}

/// Shows what opens a disk, where its document has it.
pub fn show(disk: &mut Element, kept: Option<&Element>, secret: Uuid) {
    let beside = kept.is_some_and(|k| k.find(NAME).is_some());
    let opened = Element::new("secret").with("type", "passphrase").with("uuid", secret);
    let e = Element::new(NAME).with("format", "luks").with("engine", "qemu").child(opened);
    match disk.elements_mut().iter_mut().find(|inner| inner.name() == "source") {
        Some(source) if !beside => source.push(e),
        _ => disk.push(e),
    }
}

/// What the state of a TPM is encrypted with.
///
/// # Errors
/// XML error, naming the attribute.
pub fn of_tpm(tpm: &Element) -> Result<Option<Uuid>, VirError> {
    let Some(e) = tpm.find("backend").and_then(|b| b.find(NAME)) else { return Ok(None) };
    match e.attribute("secret").map(Uuid::parse_str) {
        Some(Ok(secret)) => Ok(Some(secret)),
        _ => Err(wrong(Part::Domain, "the encryption of a tpm names its secret by a UUID (secret='...')")),
    }
}

/// Shows it, in place of what is said of it there.
pub fn show_tpm(tpm: &mut Element, secret: Option<Uuid>) {
    if let Some(backend) = tpm.elements_mut().iter_mut().find(|inner| inner.name() == "backend") {
        backend.elements_mut().retain(|inner| inner.name() != NAME);
        backend.push_some(secret.map(|secret| Element::new(NAME).with("secret", secret)));
    }
}

/// What a volume that is made is encrypted with.
///
/// # Errors
/// XML error; CONFIG_UNSUPPORTED, naming what is not there.
pub fn of_volume(target: &Element) -> Result<Option<(SecretName, Encryption)>, VirError> {
    let Some(e) = target.find(NAME) else { return Ok(None) };
    let part = Part::Storage;
    let name = secret(e, part)?;
    let unsupported = |e: karst_model::Error| refuse(part, e.message);
    let mut made = Encryption::default();
    if let Some(cipher) = e.find("cipher") {
        let (Some(word), Some(size)) = (cipher.attribute("name"), cipher.attribute("size")) else {
            return Err(wrong(part, "the cipher of an encryption has a name and a size"));
        };
        made.cipher = Cipher::parse("cipher", &format!("{word}-{size}")).map_err(unsupported)?;
        if let Some(mode) = cipher.attribute("mode") {
            made.mode = Mode::parse("mode", mode).map_err(unsupported)?;
        }
        if let Some(hash) = cipher.attribute("hash") {
            made.hash = Hash::parse("hash", hash).map_err(unsupported)?;
        }
    }
    if let Some(iv) = e.find("ivgen") {
        let word =
            iv.attribute("name").ok_or_else(|| wrong(part, "the ivgen of an encryption has a name"))?;
        made.iv = Iv::parse("ivgen", word).map_err(unsupported)?;
        let hash = iv.attribute("hash").unwrap_or("sha256");
        if made.iv == Iv::Essiv && hash != "sha256" {
            return Err(refuse(part, format!("ivgen essiv with '{hash}' is not there; with sha256 it is")));
        }
    }
    Ok(Some((name, made)))
}

/// Shows what a volume is encrypted with; what is usual is not said.
pub fn shown((secret, made): (Uuid, Encryption)) -> Element {
    let usual = Encryption::default();
    let opened = Element::new("secret").with("type", "passphrase").with("uuid", secret);
    let mut e = Element::new(NAME).with("format", "luks").child(opened);
    if (made.cipher, made.mode, made.hash) != (usual.cipher, usual.mode, usual.hash) {
        let (name, size) = made.cipher.as_str().rsplit_once('-').unwrap_or_default();
        let cipher = Element::new("cipher").with("name", name).with("size", size);
        e.push(cipher.with("mode", made.mode.as_str()).with("hash", made.hash.as_str()));
    }
    if made.iv != usual.iv {
        let hash = (made.iv == Iv::Essiv).then_some("sha256");
        e.push(Element::new("ivgen").with("name", made.iv.as_str()).with_some("hash", hash));
    }
    e
}

/// Names all secrets of encryptions in a document by their UUIDs, which `find` knows by what they are used with. Answers whether
/// there was one.
///
/// # Errors
/// Those of `find`.
pub fn by_uuid(
    e: &mut Element,
    find: &mut dyn FnMut(&str) -> Result<Uuid, VirError>,
) -> Result<bool, VirError> {
    // What holds text has no elements, and keeps its text.
    if e.elements().is_empty() {
        return Ok(false);
    }
    let of_encryption = e.name() == NAME;
    let mut changed = false;
    for inner in e.elements_mut() {
        match inner.attribute("usage").map(str::to_owned) {
            Some(usage) if of_encryption && inner.name() == "secret" && inner.attribute("uuid").is_none() => {
                inner.set("uuid", find(&usage)?);
                inner.unset("usage");
                changed = true;
            }
            _ => changed |= by_uuid(inner, find)?,
        }
    }
    Ok(changed)
}

#[cfg(test)]
mod tests {
    use super::{super::read::document, *};

    const UUID: &str = "0a81f5b2-8403-7b23-c8d6-21ccc2f80d6f";

    fn disk(within: &str, beside: &str) -> Element {
        let text = format!("<disk type='file'><source file='/a'>{within}</source>{beside}</disk>");
        document(&text).unwrap()
    }

    #[test]
    fn secrets_of_disks_are_read_in_both_places_and_shown_where_they_were() {
        let luks =
            format!("<encryption format='luks'><secret type='passphrase' uuid='{UUID}'/></encryption>");
        assert_eq!(of_disk(&disk("", "")), Ok(None));
        let uuid = Uuid::parse_str(UUID).unwrap();
        for kept in [disk(&luks, ""), disk("", &luks)] {
            assert_eq!(of_disk(&kept), Ok(Some(SecretName::Uuid(uuid))));
            let mut now = disk("", "");
            show(&mut now, Some(&kept), uuid);
            assert_eq!(of_disk(&now), of_disk(&kept));
            assert_eq!(now.find(NAME).is_some(), kept.find(NAME).is_some(), "in the same place");
            assert!(now.document().contains("engine='qemu'"));
        }
        let mut fresh = disk("", "");
        show(&mut fresh, None, uuid);
        assert!(fresh.find("source").unwrap().find(NAME).is_some());
        let usage = luks.replace("uuid", "usage");
        assert_eq!(of_disk(&disk(&usage, "")), Ok(Some(SecretName::Usage(UUID.into()))));

        for (bad, code, word) in [
            (disk(&luks, &luks), Code::XmlError, "source"),
            (disk(&luks.replace("'luks'", "'qcow'"), ""), Code::ConfigUnsupported, "'qcow'"),
            (disk(&luks.replace("'luks'", "'luks' engine='librbd'"), ""), Code::ConfigUnsupported, "librbd"),
            (disk("<encryption format='luks'/>", ""), Code::ConfigUnsupported, "one secret"),
            (disk(&luks.replace(UUID, "mine"), ""), Code::XmlError, "mine"),
            (
                disk(&luks.replace("</enc", "<cipher name='aes'/></enc"), ""),
                Code::ConfigUnsupported,
                "cipher",
            ),
        ] {
            let e = of_disk(&bad).unwrap_err();
            assert!(e.code == code && e.text.contains(word), "{e:?}");
        }
    }

    #[test]
    fn what_volumes_are_encrypted_with_is_read_as_it_is_shown() {
        let target = |inner: &str| {
            let text = format!(
                "<target><encryption format='luks'><secret type='passphrase' uuid='{UUID}'/>{inner}</encryption></target>"
            );
            document(&text).unwrap()
        };
        let usual = of_volume(&target("")).unwrap().unwrap();
        assert_eq!(usual.1, Encryption::default());
        let odd = target(
            "<cipher name='serpent' size='256' mode='cbc' hash='sha512'/><ivgen name='essiv' hash='sha256'/>",
        );
        for made in [usual, of_volume(&odd).unwrap().unwrap()] {
            let SecretName::Uuid(uuid) = made.0 else { panic!("{:?}", made.0) };
            let again = Element::new("target").child(shown((uuid, made.1)));
            assert_eq!(of_volume(&again).unwrap().unwrap(), made);
        }
        for (inner, code, word) in [
            ("<cipher name='aes'/>", Code::XmlError, "size"),
            ("<cipher name='des' size='64'/>", Code::ConfigUnsupported, "des-64"),
            ("<cipher name='aes' size='256' mode='ecb'/>", Code::ConfigUnsupported, "ecb"),
            ("<ivgen name='essiv' hash='md5'/>", Code::ConfigUnsupported, "md5"),
            ("<ivgen/>", Code::XmlError, "ivgen"),
        ] {
            let e = of_volume(&target(inner)).unwrap_err();
            assert!(e.code == code && e.text.contains(word), "{inner}: {e:?}");
        }
    }

    #[test]
    fn tpms_name_what_their_state_is_encrypted_with() {
        let tpm = |inner: &str| {
            document(&format!("<tpm model='tpm-tis'><backend type='emulator'>{inner}</backend></tpm>"))
                .unwrap()
        };
        let uuid = Uuid::parse_str(UUID).unwrap();
        assert_eq!(of_tpm(&tpm("")), Ok(None));
        let mut e = tpm(&format!("<encryption secret='{UUID}'/>"));
        assert_eq!(of_tpm(&e), Ok(Some(uuid)));
        show_tpm(&mut e, Some(uuid));
        assert_eq!(e.document().matches("encryption").count(), 1);
        show_tpm(&mut e, None);
        assert_eq!(of_tpm(&e), Ok(None));
        assert_eq!(of_tpm(&tpm("<encryption/>")).unwrap_err().code, Code::XmlError);
    }

    #[test]
    fn secrets_are_named_by_their_uuids() {
        let text = "<domain><name>x</name><devices><disk><source file='/a'/><encryption format='luks'>\
                    <secret type='passphrase' usage='/a'/></encryption></disk><tpm usage='/b'/></devices></domain>";
        let mut e = document(text).unwrap();
        let uuid = Uuid::parse_str(UUID).unwrap();
        let mut asked = vec![];
        let mut find = |usage: &str| {
            asked.push(usage.to_owned());
            Ok(uuid)
        };
        assert_eq!(by_uuid(&mut e, &mut find), Ok(true));
        assert_eq!(by_uuid(&mut e, &mut find), Ok(false));
        assert_eq!(asked, ["/a"]);
        let shown = e.document();
        assert!(shown.contains(&format!("uuid='{UUID}'")) && shown.contains("<name>x</name>"), "{shown}");
        let mut gone = document(text).unwrap();
        let missing = VirError::new(Code::NoSecret, Part::Secret, "none");
        assert_eq!(by_uuid(&mut gone, &mut |_| Err(missing.clone())), Err(missing.clone()));
    }
}
