//! Encrypted volumes and disks over the protocol: made with a secret that is named by its UUID or by what it is used with, shown again,
//! started, and refused with the secret that is missing.
#![allow(clippy::disallowed_methods)] // a test tool

use crate::{
    define::{define, dump},
    host::{arguments, ask, number, string},
    support::{Client, Refused, Server},
};
use karst_engine::secrets::SecretKey;
use karst_frontend_libvirt::{error::Code, xdr::Reader};
use uuid::Uuid;

const WORDS: &[u8] = b"open sesame, says Ali";

async fn ready() -> (Server, Client, Vec<u8>) {
    let server = Server::start().await;
    server.engine.set_secret_key(SecretKey::new(&[7; 32]).unwrap());
    let mut client = server.open("full", "qemu:///system").await;
    let pool = ask(&mut client, "STORAGE_POOL_LOOKUP_BY_NAME", |w| w.string("default")).await.unwrap();
    (server, client, pool)
}

/// Defines a secret of a volume, with a value.
async fn secret(client: &mut Client, n: u128, value: bool) -> Vec<u8> {
    let xml = format!(
        "<secret private='yes'><uuid>{}</uuid><usage type='volume'><volume>/volumes/{n}</volume></usage></secret>",
        Uuid::from_u128(n)
    );
    let secret = ask(client, "SECRET_DEFINE_XML", |w| w.string(&xml).u32(0)).await.unwrap();
    if value {
        let rest = arguments(|w| w.opaque(WORDS).u32(0));
        client.call(number("SECRET_SET_VALUE"), &[&secret[..], &rest].concat()).await.unwrap();
    }
    secret
}

fn by_usage(n: u128) -> String {
    format!("<secret type='passphrase' usage='/volumes/{n}'/>")
}

fn by_uuid(n: u128) -> String {
    format!("<secret type='passphrase' uuid='{}'/>", Uuid::from_u128(n))
}

async fn volume(client: &mut Client, pool: &[u8], name: &str, inner: &str) -> Result<Vec<u8>, Refused> {
    let xml = format!(
        "<volume><name>{name}</name><capacity unit='MiB'>8</capacity><target><format type='raw'/>\
         <encryption format='luks'>{inner}</encryption></target></volume>"
    );
    let rest = arguments(|w| w.string(&xml).u32(0));
    client.call(number("STORAGE_VOL_CREATE_XML"), &[pool, &rest].concat()).await
}

async fn shown(client: &mut Client, volume: &[u8]) -> String {
    string(&client.call(number("STORAGE_VOL_GET_XML_DESC"), &[volume, &[0; 4]].concat()).await.unwrap())
}

fn disk(volume: &str, target: &str, secret: &str) -> String {
    format!(
        "<disk type='volume' device='disk'><driver name='qemu' type='raw'/><source pool='default' volume='{volume}'>\
         <encryption format='luks'>{secret}</encryption></source><target dev='{target}' bus='scsi'/></disk>"
    )
}

fn domain(disk: &str) -> String {
    format!(
        "<domain type='qemu'><name>m1</name><memory unit='MiB'>256</memory><vcpu>1</vcpu>\
         <os><type arch='x86_64' machine='q35'>hvm</type></os><devices>{disk}</devices></domain>"
    )
}

/// Nothing that is recorded has the passphrase, and the host holds none.
fn nothing_is_left(server: &Server) {
    let records = format!("{:?}", server.engine.inner().inventory.read());
    assert!(!records.contains("sesame"));
    assert!(server.host.held_keys().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn volumes_are_made_with_a_secret_and_show_it() {
    let (server, mut client, pool) = ready().await;
    for inner in [by_usage(1), by_uuid(1)] {
        let e = volume(&mut client, &pool, "v1", &inner).await.unwrap_err();
        assert!(e.0 == Code::NoSecret as i32, "{e:?}");
    }
    secret(&mut client, 1, true).await;
    let made = volume(&mut client, &pool, "v1", &by_usage(1)).await.unwrap();
    let xml = shown(&mut client, &made).await;
    let wanted = format!("<encryption format='luks'>\n      {}\n    </encryption>", by_uuid(1));
    assert!(xml.contains(&wanted) && xml.contains("<capacity unit='bytes'>8388608</capacity>"), "{xml}");
    nothing_is_left(&server);

    let cipher =
        "<cipher name='aes' size='128' mode='cbc' hash='sha512'/><ivgen name='essiv' hash='sha256'/>";
    let odd = volume(&mut client, &pool, "v2", &format!("{}{cipher}", by_uuid(1))).await.unwrap();
    let xml = shown(&mut client, &odd).await;
    for element in cipher.split_inclusive("/>") {
        assert!(xml.contains(element), "{element} in {xml}");
    }
    let e = volume(&mut client, &pool, "v3", &format!("{}<cipher name='des' size='64'/>", by_uuid(1))).await;
    assert_eq!(e.unwrap_err().0, Code::ConfigUnsupported as i32);

    // Up and down go the bytes of the container: more than the capacity.
    let download = arguments(|w| w.u64(0).u64(0).u32(1));
    client.call(number("STORAGE_VOL_DOWNLOAD"), &[&made[..], &download].concat()).await.unwrap();
    let first = client.receive().await;
    assert!(first.payload.starts_with(b"LUKS\xba\xbe"), "{:?}", first.header);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn domains_open_their_disks_and_say_which_secret_is_missing() {
    let (server, mut client, pool) = ready().await;
    let first = secret(&mut client, 1, true).await;
    let second = secret(&mut client, 2, true).await;
    volume(&mut client, &pool, "v1", &by_uuid(1)).await.unwrap();
    volume(&mut client, &pool, "v2", &by_uuid(2)).await.unwrap();

    let e = define(&mut client, &domain(&disk("v1", "sda", &by_usage(9)))).await.unwrap_err();
    assert!(e.0 == Code::NoSecret as i32 && e.1.contains("/volumes/9"), "{e:?}");
    define(&mut client, &domain(&disk("v1", "sda", &by_usage(1)))).await.unwrap();
    let xml = dump(&mut client, "m1", 2).await;
    assert!(xml.contains("<encryption format='luks' engine='qemu'>") && xml.contains(&by_uuid(1)), "{xml}");
    assert!(!xml.contains("usage="), "{xml}");
    // What is shown defines the same.
    define(&mut client, &xml).await.unwrap();
    assert_eq!(dump(&mut client, "m1", 2).await, xml);

    let m1 = client.domain("m1").await;
    client.call(number("DOMAIN_CREATE"), &m1).await.unwrap();
    nothing_is_left(&server);
    let attach = |xml: &str| [&m1[..], &arguments(|w| w.string(xml).u32(1))].concat();
    // Without its value it does not come, and nothing has changed; with it, it does.
    client.call(number("SECRET_UNDEFINE"), &second).await.unwrap();
    secret(&mut client, 2, false).await;
    let more = attach(&disk("v2", "sdb", &by_uuid(2)));
    let e = client.call(number("DOMAIN_ATTACH_DEVICE_FLAGS"), &more).await.unwrap_err();
    assert!(e.1.contains(&Uuid::from_u128(2).to_string()), "{e:?}");
    assert!(!dump(&mut client, "m1", 0).await.contains("sdb"));
    secret(&mut client, 2, true).await;
    client.call(number("DOMAIN_ATTACH_DEVICE_FLAGS"), &more).await.unwrap();
    assert!(dump(&mut client, "m1", 0).await.contains(&by_uuid(2)));
    nothing_is_left(&server);

    // libvirt lets secrets go that are used; the next start says so.
    client.call(number("SECRET_UNDEFINE"), &first).await.unwrap();
    assert_eq!(client.state(&m1).await.0, 1, "what runs goes on");
    client.call(number("DOMAIN_DESTROY"), &m1).await.unwrap();
    let e = client.call(number("DOMAIN_CREATE"), &m1).await.unwrap_err();
    assert!(e.1.contains(&Uuid::from_u128(1).to_string()) && e.1.contains("define it"), "{e:?}");
    secret(&mut client, 1, true).await;
    client.call(number("DOMAIN_CREATE"), &m1).await.unwrap();
    nothing_is_left(&server);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_there_is_refused_by_its_name() {
    let (_server, mut client, pool) = ready().await;
    secret(&mut client, 1, true).await;
    volume(&mut client, &pool, "v1", &by_uuid(1)).await.unwrap();
    let good = domain(&disk("v1", "sda", &by_uuid(1)));
    for (from, to, code, word) in [
        ("format='luks'", "format='qcow'", Code::ConfigUnsupported, "'qcow'"),
        ("format='luks'", "format='luks2'", Code::ConfigUnsupported, "'luks2'"),
        ("format='luks'", "format='luks' engine='librbd'", Code::ConfigUnsupported, "librbd"),
        ("</encryption>", "<cipher name='aes' size='256'/></encryption>", Code::ConfigUnsupported, "cipher"),
        (
            "<target dev",
            "<encryption format='luks'><secret type='passphrase' usage='/volumes/1'/></encryption><target dev",
            Code::XmlError,
            "source",
        ),
    ] {
        let e = define(&mut client, &good.replacen(from, to, 1)).await.unwrap_err();
        assert!(e.0 == code as i32 && e.1.contains(word), "{to}: {e:?}");
    }
    let all = client.call(number("CONNECT_NUM_OF_DEFINED_DOMAINS"), &[]).await.unwrap();
    assert_eq!(Reader::new(&all).i32().unwrap(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_state_of_a_tpm_is_encrypted_with_a_secret() {
    let (server, mut client, pool) = ready().await;
    secret(&mut client, 1, true).await;
    volume(&mut client, &pool, "v1", &by_uuid(1)).await.unwrap();
    let tpm = |n: u128| {
        let uuid = Uuid::from_u128(n);
        format!(
            "{}<tpm model='tpm-tis'><backend type='emulator' version='2.0'><encryption secret='{uuid}'/></backend></tpm>",
            disk("v1", "sda", &by_uuid(1))
        )
    };
    define(&mut client, &domain(&tpm(2))).await.unwrap();
    let wanted = format!("<encryption secret='{}'/>", Uuid::from_u128(2));
    let xml = dump(&mut client, "m1", 2).await;
    assert!(xml.contains(&wanted), "{xml}");
    let m1 = client.domain("m1").await;
    let e = client.call(number("DOMAIN_CREATE"), &m1).await.unwrap_err();
    assert!(e.1.contains(&Uuid::from_u128(2).to_string()) && e.1.contains("define it"), "{e:?}");
    // Another one, and none.
    define(&mut client, &xml.replace(&wanted, &wanted.replace('2', "1"))).await.unwrap();
    client.call(number("DOMAIN_CREATE"), &m1).await.unwrap();
    nothing_is_left(&server);
    client.call(number("DOMAIN_DESTROY"), &m1).await.unwrap();
    define(&mut client, &xml.replace(&wanted, "")).await.unwrap();
    assert!(!dump(&mut client, "m1", 2).await.contains("<encryption secret="));
    let e = define(&mut client, &xml.replace(&wanted, "<encryption/>")).await.unwrap_err();
    assert!(e.0 == Code::XmlError as i32 && e.1.contains("secret="), "{e:?}");
}
