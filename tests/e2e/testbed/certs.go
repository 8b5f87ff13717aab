package testbed

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"

	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

// authority signs certificates and writes them below a directory.
type authority struct {
	dir  string
	name string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// subject is whom a certificate is for.
type subject struct {
	name   string // common name
	group  string // organization, which Kubernetes takes for a group
	server bool
	hosts  []string // names and addresses
}

func newAuthority(dir, name string) (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	a := &authority{dir: dir, name: name, key: key}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(0, 0, 2),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return nil, err
	}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		return nil, err
	}
	return a, errors.Join(writePEM(a.path(name+".crt"), "CERTIFICATE", der), writeKey(a.path(name+".key"), key))
}

func (a *authority) path(file string) string { return filepath.Join(a.dir, file) }

// issue writes FILE.crt and FILE.key.
func (a *authority) issue(file string, to subject) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: to.name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(0, 0, 2),
		KeyUsage:    x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	if to.group != "" {
		template.Subject.Organization = []string{to.group}
	}
	if to.server {
		template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	}
	for _, host := range to.hosts {
		if ip := net.ParseIP(host); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, host)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, &key.PublicKey, a.key)
	if err != nil {
		return err
	}
	return errors.Join(writePEM(a.path(file+".crt"), "CERTIFICATE", der), writeKey(a.path(file+".key"), key))
}

// kubeconfig writes FILE.kubeconfig for a certificate that was issued.
func (a *authority) kubeconfig(file, server string) error {
	config := clientcmdapi.NewConfig()
	config.Clusters["e2e"] = &clientcmdapi.Cluster{Server: server, CertificateAuthority: a.path(a.name + ".crt")}
	config.AuthInfos[file] = &clientcmdapi.AuthInfo{ClientCertificate: a.path(file + ".crt"), ClientKey: a.path(file + ".key")}
	config.Contexts["e2e"] = &clientcmdapi.Context{Cluster: "e2e", AuthInfo: file}
	config.CurrentContext = "e2e"
	return clientcmd.WriteToFile(*config, a.path(file+".kubeconfig"))
}

func writeKey(path string, key *ecdsa.PrivateKey) error {
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	return writePEM(path, "EC PRIVATE KEY", der)
}

func writePEM(path, kind string, der []byte) error {
	return os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
}

// writeCertificates makes everything that the cluster's programs need to know and
// trust each other, and a kubeconfig for the tests (admin).
func writeCertificates(dir, node string) error {
	ca, err := newAuthority(dir, "ca")
	if err != nil {
		return err
	}
	front, err := newAuthority(dir, "front-proxy-ca")
	if err != nil {
		return err
	}
	errs := errors.Join(
		ca.issue("apiserver", subject{name: "kube-apiserver", server: true, hosts: []string{
			nodeIP4, "127.0.0.1", serviceIP4, "localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"}}),
		ca.issue("apiserver-kubelet-client", subject{name: "kube-apiserver-kubelet-client", group: "system:masters"}),
		front.issue("front-proxy-client", subject{name: "front-proxy-client"}),
		ca.issue("kubelet-serving", subject{name: "system:node:" + node, group: "system:nodes", server: true, hosts: []string{nodeIP4, node}}),
	)
	for file, who := range map[string]subject{
		"admin":                   {name: "admin", group: "system:masters"},
		"kubelet":                 {name: "system:node:" + node, group: "system:nodes"},
		"kube-controller-manager": {name: "system:kube-controller-manager"},
		"kube-scheduler":          {name: "system:kube-scheduler"},
		"kube-proxy":              {name: "system:kube-proxy"},
	} {
		errs = errors.Join(errs, ca.issue(file, who), ca.kubeconfig(file, apiURL))
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	public, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		return err
	}
	return errors.Join(errs, writeKey(ca.path("sa.key"), key), writePEM(ca.path("sa.pub"), "PUBLIC KEY", public))
}
