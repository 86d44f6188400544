//! libvirt's protocol over TLS: who is let in, as whom, and what strangers cannot do.
#![allow(clippy::disallowed_methods)] // a test

use crate::support::{PATIENCE, Server, argument};
use karst_engine::{
    Context,
    tenancy::{
        server::{NetworkListener, ServerSettings},
        tokens::NewApiToken,
        trust::{CertificateSettings, NewCertificate},
    },
};
use karst_frontend_libvirt::{
    Front,
    error::Code,
    frame::{Frame, Header, Kind, REMOTE, Status},
    remote::{Bounds, Network},
    xdr::Reader,
};
use karst_model::{
    access::{Principal, Role},
    instance::InstanceKind,
    trust::CertificateKind,
};
use karst_tls::{Authority, authority::Issued};
use rustls::{
    ClientConfig, RootCertStore,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
};
use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

const TODAY: jiff::civil::Date = jiff::civil::date(2026, 1, 1);
/// Time for a handshake where some never shake hands: others do it in that, also where a thread stands still for a while.
const HANDSHAKE: Duration = Duration::from_secs(5);

struct Listening {
    server: Server,
    network: Arc<Network>,
    authority: Arc<Authority>,
    settings: ServerSettings,
}

/// A port of loopback that nobody has and nobody is given by chance: below those that the kernel draws for connections
/// and for port 0, and never the same twice in one program.
fn unused_address() -> SocketAddr {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let first = std::process::id().wrapping_mul(64);
    let drawn = || 10_000 + (first.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % 20_000) as u16;
    let free = |port: &u16| std::net::TcpListener::bind(("127.0.0.1", *port)).is_ok();
    let mut ports = std::iter::repeat_with(drawn).take(1000);
    SocketAddr::from(([127, 0, 0, 1], ports.find(free).expect("one of 1,000 ports is free")))
}

impl Listening {
    async fn start(bounds: Bounds) -> Self {
        let server = Server::start().await;
        let authority = Arc::new(Authority::new(server.dir.path().to_owned(), "libvirt-ca", "host1"));
        let network = Network::new(Front::new(server.engine.clone()), authority.clone(), bounds);
        let settings = ServerSettings { libvirt_address: Some(unused_address()), ..Default::default() };
        network.ensure(&settings).await.unwrap();
        Self { server, network, authority, settings }
    }

    fn address(&self) -> SocketAddr {
        self.settings.libvirt_address.unwrap()
    }

    async fn trust(&self, issued: &Issued, projects: &[&str]) {
        let new = NewCertificate { fingerprint: issued.fingerprint.clone(), pem: issued.certificate.clone() };
        let settings = CertificateSettings {
            name: "client".into(),
            description: String::new(),
            kind: CertificateKind::Client,
            restricted: !projects.is_empty(),
            projects: projects.iter().map(|p| (*p).to_owned()).collect(),
        };
        let admin = Context::new(Principal::system());
        self.server.engine.certificate_add(&admin, new, settings).await.unwrap();
    }

    /// A client that is trusted, everywhere or in projects.
    async fn client(&self, projects: &[&str]) -> Issued {
        let issued = self.authority.client("client", TODAY).unwrap();
        self.trust(&issued, projects).await;
        issued
    }

    /// A connection past the handshake, and the byte that says whether it is let in.
    async fn connect(&self, of: Option<&Issued>, name: &str) -> std::io::Result<(u8, Tls)> {
        let mut roots = RootCertStore::empty();
        let ca = self.authority.certificate(TODAY).unwrap();
        roots.add(CertificateDer::from_pem_slice(ca.as_bytes()).unwrap()).unwrap();
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
        let config = match of {
            None => builder.with_no_client_auth(),
            Some(issued) => {
                let certificate = CertificateDer::from_pem_slice(issued.certificate.as_bytes()).unwrap();
                let key = PrivateKeyDer::from_pem_slice(issued.key.as_bytes()).unwrap();
                builder.with_client_auth_cert(vec![certificate], key).unwrap()
            }
        };
        let stream = TcpStream::connect(self.address()).await?;
        let name = ServerName::try_from(name.to_owned()).unwrap();
        let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await?;
        let mut tls = Tls { stream, serial: 0 };
        let word = tokio::time::timeout(PATIENCE, tls.stream.read_u8()).await.unwrap()?;
        Ok((word, tls))
    }

    async fn enter(&self, of: &Issued) -> Tls {
        let (word, tls) = self.connect(Some(of), "127.0.0.1").await.unwrap();
        assert_eq!(word, 1);
        tls
    }
}

struct Tls {
    stream: TlsStream<TcpStream>,
    serial: u32,
}

impl Tls {
    async fn call(&mut self, procedure: i32, payload: &[u8]) -> Result<Vec<u8>, (i32, String)> {
        self.serial += 1;
        let header = Header {
            program: REMOTE,
            version: 1,
            procedure,
            kind: Kind::Call,
            serial: self.serial,
            status: Status::Ok,
        };
        self.stream.write_all(&Frame::new(header, payload.to_vec()).encode()).await.unwrap();
        let frame = tokio::time::timeout(PATIENCE, Frame::read(&mut self.stream)).await.unwrap();
        let frame = frame.unwrap().unwrap();
        assert_eq!((frame.header.serial, frame.header.procedure), (self.serial, procedure));
        if frame.header.status == Status::Ok {
            return Ok(frame.payload.to_vec());
        }
        let mut r = Reader::new(&frame.payload);
        let (code, _) = (r.i32().unwrap(), r.i32().unwrap());
        Err((code, r.option(|r| r.string()).unwrap().unwrap()))
    }

    async fn open(&mut self, uri: &str, flags: u32) -> Result<(), (i32, String)> {
        let arguments = argument(|w| {
            w.optional(Some(uri)).u32(flags);
        });
        self.call(1, &arguments).await.map(drop)
    }

    async fn names(&mut self) -> Vec<String> {
        let all = argument(|w| {
            w.i32(1).u32(0);
        });
        let payload = self.call(273, &all).await.unwrap();
        let mut r = Reader::new(&payload);
        let domains = r.array(100, |r| Ok((r.string()?, r.uuid()?, r.i32()?))).unwrap();
        domains.into_iter().map(|d| d.0).collect()
    }

    /// The connection is ended from the other side.
    async fn ends(&mut self) {
        let mut rest = vec![];
        // Whether it says so or not: that it ends is what matters.
        let _ = tokio::time::timeout(PATIENCE, self.stream.read_to_end(&mut rest)).await.expect("it ends");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trusted_certificate_is_let_in_and_does_what_the_socket_does() {
    let l = Listening::start(Bounds::default()).await;
    l.server.guest("c1", InstanceKind::Container, true).await;
    l.server.guest("v1", InstanceKind::VirtualMachine, true).await;
    let own = l.client(&[]).await;
    let mut tls = l.enter(&own).await;
    // No other authentication, and nothing before the connection is open.
    assert_eq!(tls.call(66, &[]).await.unwrap(), [0, 0, 0, 1, 0, 0, 0, 0]);
    assert_eq!(tls.call(273, &[0; 8]).await.unwrap_err().0, Code::InternalError as i32);
    tls.open("lxc:///system", 0).await.unwrap();
    assert_eq!(tls.names().await, ["c1"]);
    assert_eq!(tls.call(149, &[]).await.unwrap(), [0, 0, 0, 1], "it is secure");
    // Descriptors do not go over it.
    assert_eq!(tls.call(60, &[0, 0, 0, 8]).await.unwrap(), [0; 4]);
    assert_eq!(tls.call(60, &[0, 0, 0, 10]).await.unwrap(), [0, 0, 0, 1]);
    let mut qemu = l.enter(&own).await;
    qemu.open("qemu:///system", 0).await.unwrap();
    let name = argument(|w| {
        w.string("v1");
    });
    let v1 = qemu.call(23, &name).await.unwrap();
    let refused = qemu.call(343, &[&v1[..], &[0; 8]].concat()).await.unwrap_err();
    assert_eq!(refused.0, Code::OperationUnsupported as i32, "{refused:?}");
    // Who said that he only reads does only that.
    let mut reader = l.enter(&own).await;
    reader.open("qemu:///system", 1).await.unwrap();
    assert_eq!(reader.call(12, &v1).await.unwrap_err().0, Code::OperationDenied as i32);
    assert_eq!(reader.call(16, &v1).await.unwrap().len(), 32);
    // A frame with descriptors, or none at all, ends its own connection.
    let header = Header {
        program: REMOTE,
        version: 1,
        procedure: 66,
        kind: Kind::CallWithFds,
        serial: 9,
        status: Status::Ok,
    };
    reader.stream.write_all(&Frame::new(header, vec![0, 0, 0, 1]).encode()).await.unwrap();
    reader.ends().await;
    tls.stream.write_all(&[0xff; 64]).await.unwrap();
    tls.ends().await;
    assert_eq!(qemu.names().await, ["v1"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_else_gets_past_the_handshake() {
    let l = Listening::start(Bounds { handshake: HANDSHAKE, ..Bounds::default() }).await;
    let (word, mut none) = l.connect(None, "localhost").await.unwrap();
    assert_eq!(word, 0);
    none.ends().await;
    // Signed by the authority, and not trusted all the same.
    let stranger = l.authority.client("stranger", TODAY).unwrap();
    let (word, mut untrusted) = l.connect(Some(&stranger), "host1").await.unwrap();
    assert_eq!(word, 0);
    untrusted.ends().await;
    // Trusted, and out of its time.
    let old = l.authority.client("old", jiff::civil::date(2001, 1, 1)).unwrap();
    l.trust(&old, &[]).await;
    assert_eq!(l.connect(Some(&old), "127.0.0.1").await.unwrap().0, 0);
    // The certificate is of this server's names only, until it is given more.
    let client = l.client(&[]).await;
    assert!(l.connect(Some(&client), "host1.example.com").await.is_err());
    let more = ServerSettings { libvirt_names: vec!["host1.example.com".into()], ..l.settings.clone() };
    l.network.ensure(&more).await.unwrap();
    assert_eq!(l.connect(Some(&client), "host1.example.com").await.unwrap().0, 1);
    // What is no TLS is closed, and so is what says nothing.
    let mut plain = TcpStream::connect(l.address()).await.unwrap();
    plain.write_all(&[0, 0, 0, 28, 0x20, 0, 0x80, 0x86, 0, 0, 0, 1, 0, 0, 0, 66]).await.unwrap();
    let mut silent = TcpStream::connect(l.address()).await.unwrap();
    for stream in [&mut plain, &mut silent] {
        let mut rest = vec![];
        let _ = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut rest)).await.expect("it is closed");
    }
    assert_eq!(l.connect(Some(&client), "localhost").await.unwrap().0, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restricted_certificate_has_its_project_only() {
    let l = Listening::start(Bounds::default()).await;
    let admin = Context::new(Principal::system());
    l.server.engine.project_create(&admin, "tenant", "", Default::default()).await.unwrap();
    l.server.guest("secret", InstanceKind::Container, true).await;
    let own = l.client(&["tenant"]).await;
    let mut tls = l.enter(&own).await;
    let refused = tls.open("lxc:///system", 0).await.unwrap_err();
    assert!(refused.1.contains("\"default\" not found"), "{refused:?}");
    tls.open("lxc:///system?project=tenant", 0).await.unwrap();
    assert!(tls.names().await.is_empty());
    // What clients ask of the host is told, and nothing of others.
    assert!(!tls.call(7, &[]).await.unwrap().is_empty());
    assert!(!tls.call(6, &[]).await.unwrap().is_empty());
    let secret = argument(|w| {
        w.string("secret");
    });
    assert_eq!(tls.call(23, &secret).await.unwrap_err().0, Code::NoDomain as i32);
    let pool = argument(|w| {
        w.string("<pool type='dir'><name>p</name></pool>").u32(0);
    });
    let refused = tls.call(77, &pool).await.unwrap_err();
    assert_eq!(refused.0, Code::AccessDenied as i32, "{refused:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn trust_and_the_listener_end_connections_that_are_open() {
    let l = Listening::start(Bounds::default()).await;
    let (first, second) = (l.client(&[]).await, l.client(&[]).await);
    let mut idle = l.enter(&first).await;
    idle.open("qemu:///system", 0).await.unwrap();
    let mut other = l.enter(&second).await;
    other.open("qemu:///system", 0).await.unwrap();
    let admin = Context::new(Principal::system());
    l.server.engine.certificate_delete(&admin, &first.fingerprint).await.unwrap();
    idle.ends().await;
    assert_eq!(l.connect(Some(&first), "localhost").await.unwrap().0, 0);
    assert!(other.names().await.is_empty());
    // The same of the listener; its port is free then.
    l.network.release(&ServerSettings::default()).await;
    other.ends().await;
    assert!(TcpStream::connect(l.address()).await.is_err());
    std::net::TcpListener::bind(l.address()).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_are_bounded() {
    let bounds =
        Bounds { handshake: HANDSHAKE, handshakes: 2, connections: 3, of_one: 2, ..Bounds::default() };
    let l = Listening::start(bounds).await;
    let (first, second) = (l.client(&[]).await, l.client(&[]).await);
    // Those that never shake hands hold up the others as long as they may, and no longer.
    let mut silent = vec![];
    for _ in 0..4 {
        silent.push(TcpStream::connect(l.address()).await.unwrap());
    }
    let one = l.enter(&first).await;
    let two = l.enter(&first).await;
    assert_eq!(l.connect(Some(&first), "localhost").await.unwrap().0, 0, "two of one client");
    let three = l.enter(&second).await;
    assert_eq!(l.connect(Some(&second), "localhost").await.unwrap().0, 0, "three of all");
    drop((one, two));
    let again = async {
        while l.connect(Some(&second), "localhost").await.unwrap().0 == 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, again).await.expect("a place is free again");
    drop(three);
    // An address that somebody has is refused by its key.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let settings =
        ServerSettings { libvirt_address: Some(taken.local_addr().unwrap()), ..Default::default() };
    l.network.release(&settings).await;
    let e = l.network.ensure(&settings).await.unwrap_err();
    assert_eq!(e.field.as_deref(), Some("config.core.libvirt_address"));
}

/// A message of SASL as arguments: a word for each byte.
fn message(mechanism: Option<&str>, said: &str) -> Vec<u8> {
    argument(|w| {
        if let Some(mechanism) = mechanism {
            w.string(mechanism);
        }
        w.i32(0);
        w.array(said.as_bytes(), |w, b| {
            w.u32(u32::from(*b));
        });
    })
}

/// Is it complete, and what the server said.
fn answered(payload: &[u8]) -> (bool, String) {
    let mut r = Reader::new(payload);
    let (complete, absent) = (r.i32().unwrap(), r.i32().unwrap());
    assert_eq!(absent, 0);
    let bytes = r.array(4096, |r| r.u32()).unwrap().into_iter().map(|b| b as u8).collect();
    r.end().unwrap();
    (complete == 1, String::from_utf8(bytes).unwrap())
}

impl Tls {
    /// Logs in as a client does, and checks the server's own proof.
    async fn login(&mut self, user: &str, password: &str) -> Result<(), (i32, String)> {
        use ::ring::{digest, hmac, pbkdf2};
        use base64::{Engine as _, prelude::BASE64_STANDARD};
        let offered = argument(|w| {
            w.string("SCRAM-SHA-256");
        });
        assert_eq!(self.call(67, &[]).await?, offered);
        let bare = format!("n={user},r=abcdef");
        let (complete, first) =
            answered(&self.call(68, &message(Some("SCRAM-SHA-256"), &format!("n,,{bare}"))).await?);
        assert!(!complete);
        let mut parts = first.split(',');
        let nonce = parts.next().unwrap().strip_prefix("r=").unwrap();
        assert!(nonce.starts_with("abcdef") && nonce.len() > 40);
        let salt = BASE64_STANDARD.decode(parts.next().unwrap().strip_prefix("s=").unwrap()).unwrap();
        let rounds = parts.next().unwrap().strip_prefix("i=").unwrap().parse().unwrap();
        let mut salted = [0; 32];
        pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, rounds, &salt, password.as_bytes(), &mut salted);
        let sign = |key: &[u8], text: &[u8]| hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), text);
        let key = sign(&salted, b"Client Key");
        let stored = digest::digest(&digest::SHA256, key.as_ref());
        let without = format!("c=biws,r={nonce}");
        let said = format!("{bare},{first},{without}");
        let signature = sign(stored.as_ref(), said.as_bytes());
        let proof: Vec<u8> = key.as_ref().iter().zip(signature.as_ref()).map(|(a, b)| a ^ b).collect();
        let last = format!("{without},p={}", BASE64_STANDARD.encode(proof));
        let (complete, said_last) = answered(&self.call(69, &message(None, &last)).await?);
        let own = sign(sign(&salted, b"Server Key").as_ref(), said.as_bytes());
        assert_eq!((complete, said_last), (true, format!("v={}", BASE64_STANDARD.encode(own))));
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_log_in_over_tls() {
    let bounds = Bounds { login: Duration::from_secs(20), logins: 2, ..Bounds::default() };
    let l = Listening::start(bounds).await;
    let admin = Context::new(Principal::system());
    l.server.engine.project_create(&admin, "tenant", "", Default::default()).await.unwrap();
    let token = async |name: &str, role, projects: &[&str]| {
        let projects = projects.iter().map(|p| (*p).to_owned()).collect();
        let new =
            NewApiToken { name: name.into(), description: String::new(), role, projects, expires_at: None };
        l.server.engine.api_token_create(&admin, new).await.unwrap()
    };
    // Nobody could log in: nobody is let in.
    assert_eq!(l.connect(None, "localhost").await.unwrap().0, 0);
    let robot = token("robot", Role::Operator, &["tenant"]).await;
    let all = token("a,b=c", Role::Admin, &[]).await;
    let stranger = async || {
        let (word, tls) = l.connect(None, "localhost").await.unwrap();
        (word == 1).then_some(tls)
    };
    // Who comes after others waits until the server has seen that those are gone: there are two places.
    let next = async || {
        let entered = async {
            loop {
                if let Some(tls) = stranger().await {
                    return tls;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(PATIENCE, entered).await.expect("a place is free again")
    };
    // Before that, four procedures: whatever else he says ends in a refusal, and the third of them the connection.
    let mut tls = next().await;
    assert_eq!(tls.call(66, &[]).await.unwrap(), [0, 0, 0, 1, 0, 0, 0, 1]);
    for procedure in [1, 60, 273] {
        assert_eq!(tls.call(procedure, &[0; 8]).await.unwrap_err().0, Code::AuthFailed as i32);
    }
    tls.ends().await;
    for (user, password) in [("robot", all.as_str()), ("robot", ""), ("nobody", robot.as_str())] {
        let mut tls = next().await;
        assert_eq!(tls.login(user, password).await.unwrap_err().0, Code::AuthFailed as i32, "{user}");
    }
    let mut tls = next().await;
    let refused = tls.call(68, &message(Some("PLAIN"), "x")).await.unwrap_err();
    assert_eq!(refused.0, Code::AuthFailed as i32);
    assert_eq!(tls.call(69, &message(None, "x")).await.unwrap_err().0, Code::AuthFailed as i32);
    // The third time is in time: the roles of the token, and its projects.
    tls.login("robot", &robot).await.unwrap();
    assert!(tls.open("lxc:///system", 0).await.unwrap_err().1.contains("\"default\" not found"));
    tls.open("lxc:///system?project=tenant", 0).await.unwrap();
    assert!(tls.names().await.is_empty());
    let mut other = next().await;
    other.login("a=2Cb=3Dc", &all).await.unwrap();
    other.open("qemu:///system", 0).await.unwrap();
    // A token that is deleted is nobody's, also where it is in use.
    l.server.engine.api_token_delete(&admin, "robot").await.unwrap();
    tls.ends().await;
    assert!(other.names().await.is_empty());
    // No frame of a stranger is large, and not many are at it at once.
    let mut large = next().await;
    large.stream.write_all(&[0, 0x10, 0, 0, 0x20, 0, 0x80, 0x86]).await.unwrap();
    large.stream.write_all(&[0; 20]).await.unwrap();
    large.ends().await;
    let (_one, _two) = (next().await, next().await);
    assert!(stranger().await.is_none(), "there are two");
    assert_eq!(other.names().await.len(), 0);
}
